"""Whether a checkpoint is right: its files, its layers, its kernels and its text."""
