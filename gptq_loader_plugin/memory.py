"""Give memory that was freed back to the system.

Preparing a layer takes and frees several times its size. Between two layers that stay, glibc keeps
what was freed: a load of 50 MB then took 112 MB (tests/unit/test_memory.py).
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["release_freed"]


def release_freed() -> None:
    """Return freed pages of the heap; does nothing where the C library has no malloc_trim."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:  # noqa: ANN401 - a C function
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
