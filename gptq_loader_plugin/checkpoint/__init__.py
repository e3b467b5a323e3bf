"""A checkpoint on disk: its config, its tensors' headers, what they imply, and reading them."""
