"""What the page keeps, and what may be loaded by name."""
