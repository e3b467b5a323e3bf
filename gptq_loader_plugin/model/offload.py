"""Keep tensors in a file instead of memory: the system reads them as they are needed."""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
from typing import IO, TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["offload_module", "offload_tensor"]


def offload_module(module: torch.nn.Module, folder: Path) -> None:
    """Move a prepared layer's tensors into files, each mapped where it was in memory.

    The module computes as before: its tensors are the same numbers, at an address that stays.
    """
    for part in module.modules():
        for name, tensor in list(part.named_buffers(recurse=False)):
            setattr(part, name, offload_tensor(tensor, folder))
        for name, tensor in list(part.named_parameters(recurse=False)):
            moved = torch.nn.Parameter(offload_tensor(tensor.data, folder), requires_grad=False)
            setattr(part, name, moved)


def offload_tensor(tensor: torch.Tensor, folder: Path) -> torch.Tensor:
    """Write a tensor to a file without a name, and give it back as a view of that file.

    A small one stays in memory. The file goes when nothing refers to the tensor any more.
    """
    if tensor.nbytes < mmap.PAGESIZE:
        return tensor
    folder.mkdir(parents=True, exist_ok=True)
    flat = tensor.detach().contiguous().flatten()
    how: dict[str, Any] = {"access": mmap.ACCESS_COPY}
    if sys.version_info >= (3, 13):
        how["trackfd"] = False  # a mapping does not keep a file descriptor
    with _open_unnamed(folder) as file:
        file.write(flat.view(torch.uint8).numpy().data)
        file.flush()
        mapped = mmap.mmap(file.fileno(), tensor.nbytes, **how)
    return torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)


def _open_unnamed(folder: Path) -> IO[bytes]:
    """Open a new file that a killed process leaves nothing of; Windows maps none without a name."""
    if os.name == "posix":
        return tempfile.TemporaryFile(dir=folder)
    return tempfile.NamedTemporaryFile(dir=folder, delete=False)
