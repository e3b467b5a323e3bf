"""Start vLLM's own server with the checkpoint's template and end tokens."""
