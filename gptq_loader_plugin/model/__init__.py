"""Build a transformers model and fill it, layer by layer, through the chosen kernels."""
