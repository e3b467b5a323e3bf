"""Look for marks in a text that comes in chunks."""

from __future__ import annotations

__all__ = ["overlap"]


def overlap(text: str, mark: str) -> int:
    """Count the last characters of `text` that begin `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
