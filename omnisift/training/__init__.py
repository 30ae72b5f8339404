"""Training: the loop, its state, its curves, and OmniSIFT's loss on the pruned sequence."""
