"""Write and read quantities as people do."""

from __future__ import annotations

import re

from gptq_loader_plugin.errors import OptionInvalid

__all__ = ["parse_size", "write_size"]

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def write_size(count: int) -> str:
    """Write a number of bytes as people do, in powers of 1,000."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}" if unit == "GB" else f"{count / size:.0f} {unit}"
    return f"{count} bytes"


def parse_size(text: str | int) -> int:
    """Read a number of bytes as people write it: 8GB is 8e9 bytes, 8GiB is 8 * 2**30.

    Raises:
        OptionInvalid: it is none.
    """
    match = SIZE.fullmatch(str(text).strip())
    if match is None:
        raise OptionInvalid(f"{text!r} is no size", hint="write 8GB, 500MB or a number of bytes")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))
