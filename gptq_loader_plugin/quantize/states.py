"""Hidden states of the calibration's batches: in memory, or in a file where they do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch

from gptq_loader_plugin.errors import QuantizeError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["States"]


class States(Sequence[torch.Tensor]):
    """A tensor for each batch, float32 [samples, tokens, hidden].

    One that lies in a file is read when it is asked for, and takes no memory otherwise.

    Args:
        file: where they lie; None keeps them in memory.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._tensors: list[torch.Tensor] = []  # of a file, their shapes on the meta device
        self._starts = [0]
        if file is not None:
            file.write_bytes(b"")

    def append(self, tensor: torch.Tensor) -> None:
        """Add a batch."""
        self._tensors.append(tensor if self._file is None else tensor.to("meta"))
        self._starts.append(self._starts[-1] + tensor.nbytes)
        if self._file is not None:
            self._write(len(self._tensors) - 1, tensor)

    def copy(self, file: Path | None) -> States:
        """Return the same states, kept elsewhere."""
        other = States(file)
        for tensor in self:
            other.append(tensor)
        return other

    def __len__(self) -> int:
        """Return how many batches there are."""
        return len(self._tensors)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[torch.Tensor]: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | list[torch.Tensor]:
        """Return a batch."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        kept = self._tensors[index]
        if self._file is None:
            return kept
        content = bytearray(kept.nbytes)
        with self._file.open("rb") as stream:
            stream.seek(self._starts[index % len(self)])
            stream.readinto(content)
        return torch.frombuffer(content, dtype=kept.dtype).view(kept.shape)

    def __setitem__(self, index: int, tensor: torch.Tensor) -> None:
        """Set a batch; its shape and dtype stay."""
        if self._file is None:
            self._tensors[index] = tensor
        else:
            self._write(index, tensor)

    def _write(self, index: int, tensor: torch.Tensor) -> None:
        if self._file is None:
            return
        content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            with self._file.open("r+b") as stream:
                stream.seek(self._starts[index])
                stream.write(content)
        except OSError as error:
            raise QuantizeError(
                f"the states between two blocks cannot be written to {self._file} "
                f"({error.strerror})",
                hint="free some disk space, then run the same command again: it goes on where it "
                "stopped",
            ) from error
