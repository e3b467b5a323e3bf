"""Memory for what a token reads of every layer, side by side and in large pages; imports torch.

The system has large pages for whole runs of 2 megabytes. Most layers are no longer than one or two,
and an allocator begins them anywhere: so they are put into mappings that many of them share.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING

import torch

from gptq_loader_plugin.system.large_pages import map_memory

if TYPE_CHECKING:
    import mmap

__all__ = ["empty", "place"]

MAPPED_BYTES = 64 << 20  # at a time
ALIGNMENT = 128


class _Mappings:
    """Mappings that are filled one after another.

    Each tensor holds on to the one it lies in, and nothing else does: it goes with the last one.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[mmap.mmap] | None = None
        self._filled = 0
        self._lock = threading.Lock()

    def take(self, size: int) -> tuple[mmap.mmap, int] | None:
        """Give so many bytes of a mapping, and where they begin, or None where there are none."""
        with self._lock:
            memory = None if self._last is None else self._last()
            if memory is None or self._filled + size > len(memory):
                memory = map_memory(max(size, MAPPED_BYTES))
                if memory is None:
                    return None
                self._last, self._filled = weakref.ref(memory), 0
            first = self._filled
            self._filled += -(-size // ALIGNMENT) * ALIGNMENT
            return memory, first


_mappings = _Mappings()


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Make a tensor on the CPU beside the one made before it, in large pages where there are any.

    It is torch's own where no mapping can be had.
    """
    count = math.prod(shape)
    taken = _mappings.take(count * dtype.itemsize) if count else None
    if taken is not None:
        memory, first = taken
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=first).view(shape)
    return torch.empty(shape, dtype=dtype, device="cpu")


def place(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor beside the one that `empty` made before it."""
    return empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
