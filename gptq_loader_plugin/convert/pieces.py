"""What a conversion writes, before it is read: names, dtypes and shapes, and how to make each.

Everything is planned from headers. A piece is made when its turn comes and forgotten once it is
written, so a conversion never holds more than one layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import torch

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint

__all__ = ["Conversion", "ConvertedLayer", "Info", "Made", "Piece", "Planned", "copied"]

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Info:
    """A tensor to write: its dtype as safetensors names it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes it takes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Made:
    """The tensors of a piece, and how far they are from the checkpoint's.

    Attributes:
        tensors: by their names.
        error: the root-mean-square difference of the weight, relative to the weight; 0 is equal to
            the bit in float32.
    """

    tensors: Mapping[str, torch.Tensor]
    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors that are made together: those of a layer, or one that stays as it is.

    Attributes:
        name: the layer, or the tensor.
        infos: what they are, by name.
        make: makes them.
        kind: for a layer, what becomes of it; None for any other tensor.
        note: why it cannot be exact, or "".
    """

    name: str
    infos: Mapping[str, Info]
    make: Callable[[], Made]
    kind: str | None = None
    note: str = ""

    @property
    def nbytes(self) -> int:
        """The bytes its tensors take."""
        return sum(info.nbytes for info in self.infos.values())


@dataclass(frozen=True, slots=True)
class Planned:
    """A conversion that was planned.

    Attributes:
        pieces: what to write, in that order.
        quantization: what `quantization_config` becomes, None where the result has none.
        dtype: what `dtype` becomes in config.json, None leaves it.
        warnings: what a user should know.
    """

    pieces: list[Piece]
    quantization: dict[str, Any] | None
    dtype: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ConvertedLayer:
    """What became of a layer.

    Attributes:
        name: its name in the checkpoint.
        kind: how it is stored now.
        error: as for `Made`.
        note: why it is not exact, or "".
    """

    name: str
    kind: str
    error: float
    note: str = ""

    @property
    def exact(self) -> bool:
        """Whether its weight is the checkpoint's to the bit, in float32."""
        return self.error == 0


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that is done.

    Attributes:
        path: the folder or file that was written.
        format: its format.
        layers: what became of each layer.
        source_bytes: the weights' bytes before.
        written_bytes: and now.
        warnings: what a user should know.
    """

    path: Path
    format: str
    layers: tuple[ConvertedLayer, ...]
    source_bytes: int
    written_bytes: int
    warnings: tuple[str, ...] = field(default=())


def copied(checkpoint: Checkpoint, name: str) -> Piece:
    """Plan to write one tensor as it is."""
    info = checkpoint.headers[name]
    return Piece(
        name,
        {name: Info(info.dtype, tuple(info.shape))},
        lambda: Made({name: checkpoint.tensor(name)}),
    )
