"""Write quantities as people do."""

from __future__ import annotations

__all__ = ["write_size"]


def write_size(count: int) -> str:
    """Write a number of bytes as people do, in powers of 1,000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if unit == "GB" else f"{count / size:.0f} {unit}"
    return f"{count} bytes"
