"""Predict what vLLM will do with a checkpoint, without importing vLLM."""
