"""What the tests and the demo stand on in place of a cluster's services."""
