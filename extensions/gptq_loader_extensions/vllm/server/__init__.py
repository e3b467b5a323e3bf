"""Start vLLM's own server, and tell it what the checkpoint says."""
