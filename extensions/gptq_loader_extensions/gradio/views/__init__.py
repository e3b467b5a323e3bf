"""Facts, plans and prompts as HTML."""
