"""The machine and its system: memory, files, paths."""
