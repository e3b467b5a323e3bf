"""Return freed memory to the system.

Preparing a layer takes and frees several times its size. Between two layers that stay, glibc keeps
what was freed: a load of 50 MB then took 112 MB (tests/unit/test_memory.py).
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

__all__ = ["release_freed", "share_heaps"]

ARENA_MAX = -8  # M_ARENA_MAX of glibc's malloc.h
HEAPS = 2


def release_freed() -> None:
    """Return freed pages of the heap; does nothing where the C library has no malloc_trim."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def share_heaps() -> None:
    """Have this process's threads share two heaps; does nothing where the C library has no mallopt.

    glibc gives each of the first threads one of its own, eight for each core, and what one has
    freed the others cannot use: a thread that once read a long prompt holds its pieces for good.
    """
    if sys.platform == "linux":
        mallopt: Any = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(ARENA_MAX, HEAPS)


@cache
def _malloc_trim() -> Any:  # noqa: ANN401 - a C function
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
