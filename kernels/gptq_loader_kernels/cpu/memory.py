"""Memory for what a token reads of every layer, side by side and in large pages; imports torch.

The system has large pages for whole runs of 2 megabytes. Most layers are no longer than one or two,
and an allocator begins them anywhere: so they are put into mappings that many of them share.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref
from contextlib import suppress

import torch

__all__ = ["empty", "place"]

MAPPED_BYTES = 64 << 20  # at a time
ALIGNMENT = 128
HAS_LARGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")  # Linux


class _Mappings:
    """Mappings that are filled one after another.

    Each tensor holds on to the one it lies in, and nothing else does: it goes with the last one.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[mmap.mmap] | None = None
        self._filled = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> tuple[mmap.mmap, int]:
        """Give so many bytes of a mapping, and where they begin.

        Raises:
            OSError: there are none.
        """
        with self._lock:
            memory = None if self._last is None else self._last()
            if memory is None or self._filled + size > len(memory):
                memory = _map(max(size, MAPPED_BYTES))
                self._last, self._filled = weakref.ref(memory), 0
            first = self._filled
            self._filled += -(-size // ALIGNMENT) * ALIGNMENT
            return memory, first


_mappings = _Mappings()


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Make a tensor on the CPU beside the one made before it, in large pages where there are any.

    It is torch's own where no mapping can be had: that may be for want of addresses alone.
    """
    count = math.prod(shape)
    if HAS_LARGE_PAGES and count:
        with suppress(OSError):
            memory, first = _mappings.take(count * dtype.itemsize)
            return torch.frombuffer(memory, dtype=dtype, count=count, offset=first).view(shape)
    return torch.empty(shape, dtype=dtype, device="cpu")


def place(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor beside the one that `empty` made before it."""
    return empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
