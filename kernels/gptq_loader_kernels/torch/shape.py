"""How a layer is laid out in bytes, and how much is unpacked at a time. Imports nothing heavy.

*planes*: a code's bits are split into planes of 8, 4, 2 or 1 bits, the widths that fill bytes: 7
bits are 4, 2 and 1. A plane is uint8 [N, K * width / 8], rows of the weight in order of their
groups. A byte holds codes that are a 2nd (4 bits), a 4th or an 8th of K apart, so that one shift
of a whole row of bytes gives a whole stretch of its codes.

*tables*: the scales as stored and the zeros, of each output and group; one zero for all where the
layer is symmetric. Where groups are of one size, each stands for so many rows; elsewhere a list
says the group of every so many rows, as many as divide all groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["FEW_ROWS", "Shape", "part_columns"]

# Weights unpacked at a time. Nothing here was measured on a GPU. A product of few rows is bound by
# what unpacking reads and writes, some 10 bytes a weight: a tile of 4 MB in 16 bits stays in the
# second-level cache (4 MB on a T4, 6 MB and more elsewhere). A product of many rows is bound by its
# matmul, which needs enough columns to fill the device: a part of 64 MB is 8,192 of 4,096 rows.
TILE = 1 << 21
PART = 1 << 25
# On a CPU, where each operator starts within microseconds and a core's cache holds 1 to 2 MB; and
# malloc keeps up to 32 MB for the next call, whose pages would have to be cleared again.
CPU_TILE = 1 << 19
CPU_PART = 1 << 22
# From so many rows on, a tile's matmul would leave most of a GPU idle: 64 x 64 outputs a block are
# 8 blocks at a time for 512 columns, of 40 processors in a T4.
FEW_ROWS = 32
WIDE = 4  # bytes that two different 16-bit dtypes are multiplied in
COLUMNS_MULTIPLE = 32  # so that a part's bytes begin at a multiple of 4, as Metal wants them


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a prepared layer.

    Attributes:
        unit: rows of the weight that share an entry of the tables.
        listed: whether a list says each unit's group.
        one_zero: whether one zero holds for all.
        permuted: whether x has to be brought into the order of the groups.
    """

    unit: int
    listed: bool
    one_zero: bool
    permuted: bool

    @classmethod
    def of(cls, layer: LayerSpec) -> Shape:
        """Work the sizes out."""
        return cls(
            unit=layer.group_unit,
            listed=layer.groups * layer.group_unit != layer.in_features,
            one_zero=layer.sym,
            permuted=layer.desc_act and layer.groups > 1,
        )

    def bytes(self, layer: LayerSpec, dtype: str) -> int:
        """Count what a prepared layer takes in memory."""
        codes = layer.in_features * layer.out_features * layer.bits // 8
        zeros = 1 if self.one_zero else layer.groups * layer.out_features
        scales = _size(layer.scales_dtype) * layer.groups * layer.out_features
        lists = 4 * layer.in_features // self.unit if self.listed else 0
        lists += 4 * layer.in_features if self.permuted else 0
        bias = _size(dtype) * layer.out_features if layer.bias else 0
        return codes + zeros + scales + lists + bias

    def scratch_bytes(self, layer: LayerSpec, dtype: str, device_type: str) -> int:
        """Count what unpacking a part takes, at its most: its codes, and its weights beside them.

        torch's allocator hands it to one layer after the other. A GPU converts as it reads; on a
        CPU torch converts whole operands first.
        """
        rows, size = layer.in_features, _size(dtype)
        columns = min(part_columns(rows, PART_OF.get(device_type, PART)), layer.out_features)
        peak = 1 + size
        if device_type == "cpu":
            widened = size < WIDE and layer.scales_dtype != dtype
            peak = max(peak + size, size + 2 * WIDE if widened else 0)
        tables = rows // self.unit if self.listed else layer.groups
        gathered = tables * (_size(layer.scales_dtype) + 1) if self.listed else 0
        zeros = 0 if self.one_zero else tables * size
        return columns * (rows * peak + gathered + zeros)


TILE_OF = {"cpu": CPU_TILE}
PART_OF = {"cpu": CPU_PART}


def part_columns(in_features: int, weights: int) -> int:
    """Return how many output columns of a layer are about so many weights."""
    columns = weights // in_features // COLUMNS_MULTIPLE * COLUMNS_MULTIPLE
    return max(columns, COLUMNS_MULTIPLE)


def _size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
