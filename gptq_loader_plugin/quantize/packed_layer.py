"""Pack a quantised layer as a checkpoint holds it, when its turn to be written comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from gptq_loader_plugin.convert.pieces import Info, Made, Piece
from gptq_loader_plugin.kernel.packing import pack_columns, pack_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gptq_loader_plugin.quantize.algorithm import QuantizedWeight
    from gptq_loader_plugin.quantize.options import QuantizeOptions

__all__ = ["PackedLayer", "pack_weight"]


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A quantised layer that is packed when its turn to be written comes.

    Attributes:
        shapes: dtype and shape of its tensors, by ".qweight" and so on.
        options: how it is packed.
        read: reads it.
    """

    shapes: Mapping[str, Info]
    options: QuantizeOptions
    read: Callable[[], QuantizedWeight]

    @classmethod
    def of(
        cls, weight: QuantizedWeight, options: QuantizeOptions, read: Callable[[], QuantizedWeight]
    ) -> PackedLayer:
        """Note what a weight becomes, and how to read it later."""
        (rows, columns), (groups, _) = weight.codes.shape, weight.scales.shape
        shapes = {
            ".qweight": Info("I32", (rows * options.bits // 32, columns)),
            ".qzeros": Info("I32", (groups, columns * options.bits // 32)),
            ".scales": Info("F16", (groups, columns)),
            ".g_idx": Info("I32", (rows,)),
        }
        return cls(shapes, options, read)

    def piece(self, name: str) -> Piece:
        """Plan to write it under a name."""
        infos = {f"{name}{part}": info for part, info in self.shapes.items()}
        return Piece(name, infos, lambda: Made(pack_weight(self.read(), self.options, name=name)))


def pack_weight(
    weight: QuantizedWeight, options: QuantizeOptions, *, name: str
) -> dict[str, torch.Tensor]:
    """Pack one layer's tensors as a file holds them.

    In format v1, zeros are stored minus one: with 2, 4 and 8 bits by one subtraction for a whole
    word, with borrow, and with 3 bits field by field, as the other writers do.
    """
    bits = options.bits
    zeros = weight.zeros.numpy()
    if options.checkpoint_format == "gptq" and bits == 3:
        zeros = (zeros - 1) & np.uint8((1 << bits) - 1)
    qzeros = pack_columns(zeros, bits, "continuous")
    if options.checkpoint_format == "gptq" and bits != 3:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = (qzeros.view(np.uint32) - np.uint32(ones)).view(np.int32)
    return {
        f"{name}.qweight": torch.from_numpy(pack_rows(weight.codes.numpy(), bits, "continuous")),
        f"{name}.qzeros": torch.from_numpy(np.ascontiguousarray(qzeros)),
        f"{name}.scales": weight.scales,
        f"{name}.g_idx": weight.g_idx,
    }
