"""Which other programs take a checkpoint, by rules that are data."""
