"""Have the system read files before their tensors are asked for, while something else computes."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo

__all__ = ["ReadAhead"]

# What a disk of 2 GB a second reads while the model's skeleton is built.
AHEAD_BYTES = 1 << 30
PIECE_BYTES = 8 << 20


class ReadAhead:
    """Read tensors into the system's cache in the order given, never far ahead of their use.

    A context manager: it stops when left. Does nothing where the system takes no such advice.

    Args:
        tensors: in the order in which they will be used.
        ahead: the most bytes that are read and not yet used.
    """

    def __init__(self, tensors: Sequence[TensorInfo], *, ahead: int = AHEAD_BYTES) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.start >= 0]
        self._ahead = ahead
        self._used = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def used(self, count: int) -> None:
        """Note how many bytes of the tensors, in their order, are done with."""
        with self._changed:
            self._used = count
            self._changed.notify()

    def _run(self) -> None:
        advised = 0
        for tensor in self._tensors:
            for first in range(0, tensor.nbytes, PIECE_BYTES):
                count = min(PIECE_BYTES, tensor.nbytes - first)
                if not self._wait(advised + count):
                    return
                _advise(tensor, first, count)
                advised += count

    def _wait(self, end: int) -> bool:
        """Wait until `end` is not too far ahead; False once it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or end - self._used <= self._ahead)
            return not self._stopped


def _advise(tensor: TensorInfo, first: int, count: int) -> None:
    if sys.platform != "linux":
        return
    try:
        descriptor = os.open(tensor.file, os.O_RDONLY)
    except OSError:
        return  # whoever asks for the tensor says so
    try:
        os.posix_fadvise(descriptor, tensor.start + first, count, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
