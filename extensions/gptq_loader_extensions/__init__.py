"""The hosts that come with gptq_loader_plugin; each is a plugin, found by entry point."""
