"""One tensor of a checkpoint, by its header: name, dtype, shape, and where its bytes lie."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DAMAGED", "TensorInfo"]

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
DAMAGED = "download the checkpoint again; if it stays so, it was published damaged"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor, by its header.

    Attributes:
        name: its name in the file.
        dtype: as safetensors writes it: "I32", "F16", "BF16".
        shape: its dimensions.
        file: the file that holds it.
        start: where its bytes begin in the file; -1 in a pickle.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]
