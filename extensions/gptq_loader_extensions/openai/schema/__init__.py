"""What a request may hold, and what of it has no effect."""
