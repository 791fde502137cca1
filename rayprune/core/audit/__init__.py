"""The numerics of a data audit: out-of-fold predictions, and the suspects that follow from them."""
