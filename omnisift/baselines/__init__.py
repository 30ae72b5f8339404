"""What OmniSIFT is compared with: the same inputs and drop shares in, the same result out.

Sequences without video are left whole, and a drop share of 0 means off, as in OmniSIFT. The counts
are rounded as there: of n tokens int(n * share) go.
"""
