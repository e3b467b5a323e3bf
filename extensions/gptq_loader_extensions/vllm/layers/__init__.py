"""Load and run the layers of vLLM's model; most files here import vLLM."""
