"""Open the files that hold a checkpoint's tensors, and read single tensors from them."""

from __future__ import annotations

import mmap
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.errors import CorruptCheckpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo

__all__ = ["TensorFiles", "View", "is_finite"]

TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32",
    "U32": "uint32", "I64": "int64", "U64": "uint64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "F16": "float16", "BF16": "bfloat16", "F32": "float32",
    "F64": "float64",
}  # fmt: skip
MAX_INT32 = (1 << 31) - 1  # what is beyond is no index
MAPPED_FROM = 1 << 20  # bytes: below, copying a tensor costs less than mapping it


@dataclass(frozen=True, slots=True)
class View:
    """A tensor that is made of one in a file.

    Attributes:
        whole: the header of the one in the file.
        make: makes it of that.
    """

    whole: TensorInfo
    make: Callable[[torch.Tensor], torch.Tensor]


class TensorFiles:
    """The tensors of a checkpoint's files, each read when it is asked for.

    A large tensor of a safetensors file is mapped by itself: it is a view of the file until
    something writes it, and takes no memory once nothing refers to it.

    Args:
        headers: every tensor's header, by its name.
        views: those that are made of others as they are read.
    """

    def __init__(
        self, headers: dict[str, TensorInfo], views: Mapping[str, View] | None = None
    ) -> None:
        self.headers = headers
        self._views = views or {}
        self._pickles: dict[Path, Any] = {}

    def integers(self, name: str) -> NDArray[np.int32]:
        """Read an integer tensor as a numpy array; imports no torch for safetensors.

        int64 is made int32: some writers keep g_idx so.

        Raises:
            CorruptCheckpoint: its file cannot be read any more.
        """
        info = self.headers[name]
        if info.start < 0 or name in self._views:
            values: NDArray[Any] = self.tensor(name).numpy()
        else:
            stored = np.int64 if info.dtype == "I64" else np.int32
            values = np.frombuffer(self._bytes(info), dtype=stored).reshape(info.shape)
        if values.dtype == np.int64:
            values = values.clip(-1, MAX_INT32)
        return values.astype(np.int32, copy=False)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, in the dtype it is stored in.

        Raises:
            CorruptCheckpoint: its file cannot be read any more.
        """
        view = self._views.get(name)
        if view is not None:
            return view.make(self._whole(view.whole))
        return self._whole(self.headers[name])

    def _whole(self, info: TensorInfo) -> torch.Tensor:
        import torch

        if info.start < 0:
            return self._pickled(info)
        dtype: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
        if not info.nbytes:
            return torch.empty(info.shape, dtype=dtype)
        if info.nbytes < MAPPED_FROM or info.start % dtype.itemsize:
            return torch.frombuffer(self._bytes(info), dtype=dtype).view(info.shape)
        mapped, offset = self._mapped(info)
        count = info.nbytes // dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=offset).view(info.shape)

    def close(self) -> None:
        """Close the files; tensors read so far stay valid."""
        self._pickles.clear()

    def _bytes(self, info: TensorInfo) -> bytearray:
        content = bytearray(info.nbytes)
        try:
            # unbuffered, so that nothing is read but the tensor
            with info.file.open("rb", buffering=0) as stream:
                stream.seek(info.start)
                count = stream.readinto(content)
        except OSError as error:
            raise _unreadable(info, error) from error
        if count != info.nbytes:
            raise _unreadable(info, "the file is shorter than it was")
        return content

    def _mapped(self, info: TensorInfo) -> tuple[mmap.mmap, int]:
        """Map a tensor's bytes, copied where they are written; and say where they begin."""
        offset = info.start % mmap.ALLOCATIONGRANULARITY
        how: dict[str, Any] = {"access": mmap.ACCESS_COPY, "offset": info.start - offset}
        if sys.version_info >= (3, 13):
            how["trackfd"] = False  # a mapping does not keep a file descriptor
        try:
            with info.file.open("rb") as stream:
                return mmap.mmap(stream.fileno(), offset + info.nbytes, **how), offset
        except (OSError, ValueError) as error:
            raise _unreadable(info, error) from error

    def _pickled(self, info: TensorInfo) -> torch.Tensor:
        from gptq_loader_plugin.checkpoint.pickles import load_pickle

        try:
            if info.file not in self._pickles:
                self._pickles[info.file] = load_pickle(info.file)
            tensor: torch.Tensor = self._pickles[info.file][info.name]
        except (OSError, KeyError) as error:
            raise _unreadable(info, error) from error
        return tensor


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether every value is finite; for a large tensor, a part at a time is faster."""
    import torch

    if not tensor.numel():
        return True
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return bool(torch.isfinite(tensor.float()).all())
    # a sixth of the time of isfinite().all(); either end is not-a-number where any value is
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def _unreadable(info: TensorInfo, why: object) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"{info.name} cannot be read ({why})",
        path=info.file,
        tensor=info.name,
        hint="download the file again",
    )
