"""What the programs that look at Triton's machine code share."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["range_of", "run_tool"]


@cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def run_tool(tool: str, *arguments: str) -> str:
    """Run one of the tools that Triton brings, and return what it prints."""
    done = subprocess.run(  # noqa: S603 - Triton's own tools
        [_tools() / tool, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


def range_of(values: Iterable[float]) -> str:
    """Write the smallest and the largest of some numbers, rounded: "48-72"."""
    rounded = [round(value) for value in values]
    smallest, largest = min(rounded), max(rounded)
    return f"{smallest}" if smallest == largest else f"{smallest}-{largest}"
