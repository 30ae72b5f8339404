"""Small models in the published file formats."""
