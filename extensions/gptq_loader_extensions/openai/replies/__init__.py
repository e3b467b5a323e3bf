"""From a request to a reply: runs, the engine that writes them, and the model it holds."""
