"""Methods of rounding weights, and the way through a model block by block."""
