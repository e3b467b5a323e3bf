"""Memory of the system's own, in large pages where it has them; imports torch.

What is read whole for every token is looked up anew in small pages, and that takes its time.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import torch

__all__ = ["HAS_LARGE_PAGES", "empty", "map_memory"]

PAGE = 2 << 20  # bytes of a large one
HAS_LARGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")  # Linux


def map_memory(size: int) -> mmap.mmap | None:
    """Map memory of so many bytes, all zero, in large pages where the system has them.

    None where it cannot be had: that may be for want of addresses alone. It is given back with the
    last tensor that lies in it.
    """
    if not HAS_LARGE_PAGES:
        return None
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return None
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def empty(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Make a tensor, on the CPU in large pages of its own where it fills some; else torch's own."""
    count = math.prod(shape)
    if torch.device(device).type == "cpu" and count * dtype.itemsize >= PAGE:
        memory = map_memory(count * dtype.itemsize)
        if memory is not None:
            return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)
    return torch.empty(shape, dtype=dtype, device=device)
