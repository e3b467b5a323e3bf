"""What vLLM's answers are compared with: this package's own, in float32, and where vLLM's Python is."""

from __future__ import annotations
