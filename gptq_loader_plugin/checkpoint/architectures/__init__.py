"""Checkpoints whose model was Python code of its own, read as a class of transformers'."""
