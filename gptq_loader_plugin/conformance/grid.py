"""The grid: every kind of layer a GPTQ checkpoint can hold, with every kind of input, as data."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, cast

from gptq_loader_plugin.conformance.layers import Case

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.checkpoint.zeros import ZerosFormat

__all__ = ["AXES", "INPUT_AXES", "LAYER_AXES", "Cell", "Values", "cells_of", "possible_layers"]

Values = tuple[Any, ...]
Codes = Literal["2", "3", "4", "8", "3p", "5p", "6p", "7p"]
Group = Literal["none", "16", "32", "64", "96", "128", "short"]
Order = Literal["none", "act", "trivial", "uneven", "steps"]
Zeros = Literal["v1-sym", "v1-asym", "v1-ends", "v2-sym", "v2-asym", "v2-ends"]
View = Literal["plain", "transposed", "strided", "batched"]

# The axes that cells cross in full. What the names mean:
#   codes   the width of a code; "p" is planar (gptq_p), in blocks of 32, whose zeros are v2
#   group   "none" is one group; "short" a size whose last group is short
#   order   "none": no g_idx is stored. "trivial": one is, and act-order claimed, yet rows are in
#           order. "act": rows are shuffled. "uneven": groups of any size, rows shuffled. "steps":
#           groups of unequal size, each a multiple of half the group size, rows in order
#   zeros   how they are stored, and: all the middle; around it; around it with 0 and the greatest
#   shape   K x N: multiples of all sizes; K no multiple of 96 or 128; N no multiple of 64, of 32,
#           of 8, of 2; K no multiple of 32; one group; several tiles and segments
#   dtype   of x and y;  rows: M, on both sides of the edges of tiles
CROSSED: dict[str, Values] = {
    "codes": ("2", "3", "4", "8", "3p", "5p", "6p", "7p"),
    "group": ("none", "16", "32", "64", "96", "128", "short"),
    "order": ("none", "act", "trivial", "uneven", "steps"),
    "zeros": ("v1-sym", "v1-asym", "v1-ends", "v2-sym", "v2-asym", "v2-ends"),
    "shape": ("384x192", "256x96", "576x40", "160x99", "32x32", "208x72", "40x64", "1024x336"),
    "dtype": ("float32", "float16", "bfloat16"),
    "rows": (0, 1, 2, 15, 16, 17, 33, 129),
}
# The axes that take turns in the whole grid, and are crossed pair by pair in the cover.
TURNS: dict[str, Values] = {
    "scales": ("float16", "bfloat16", "float32"),
    "bias": (False, True),
    "view": ("plain", "transposed", "strided", "batched"),
}
AXES: dict[str, Values] = CROSSED | TURNS
INPUT_AXES = ("dtype", "rows", "view")
LAYER_AXES = tuple(axis for axis in AXES if axis not in INPUT_AXES)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: a layer and an input; each field takes the values of its axis in `AXES`."""

    codes: Codes
    group: Group
    order: Order
    zeros: Zeros
    shape: str
    scales: str
    bias: bool
    dtype: str
    rows: int
    view: View

    def __str__(self) -> str:
        """Name the cell, as test ids do."""
        layer = f"{self.codes}bit-g{self.group}-{self.order}-{self.zeros}-{self.shape}"
        bias = "-bias" if self.bias else ""
        return f"{layer}-{self.scales}{bias}:{self.dtype}-m{self.rows}-{self.view}"

    @property
    def case(self) -> Case:
        """The layer."""
        rows, columns = (int(size) for size in self.shape.split("x"))
        size = _group_size(self.group, rows)
        stored, _, kind = self.zeros.partition("-")
        uneven = {"uneven": 1, "steps": size // 2}
        return Case(
            bits=int(self.codes[0]),
            group_size=size,
            act_order=self.order in ("act", "uneven"),
            sym=kind == "sym",
            rows=rows,
            columns=columns,
            dtype=self.scales,
            bias=self.bias,
            layout="planar" if self.codes.endswith("p") else "continuous",
            extreme_zeros=kind == "ends",
            zeros_format=cast("ZerosFormat", stored),
            trivial=self.order == "trivial",
            uneven=uneven.get(self.order, 0),
        )

    @property
    def layer(self) -> Cell:
        """The first cell of its layer: what all cells of a layer have in common."""
        return replace(self, **{axis: AXES[axis][0] for axis in INPUT_AXES})

    @property
    def possible(self) -> bool:
        """Whether a checkpoint can hold such a layer."""
        case = self.case
        if case.layout == "planar":
            blocks = case.rows % 32 == 0 and case.columns % 32 == 0
            if not blocks or case.zeros_format == "v1":
                return False
        block = 32 // case.bits if 32 % case.bits == 0 else 32
        if case.rows % block:  # codes fill whole words
            return False
        if self.group == "none":
            return not case.uneven
        if case.group_size >= case.rows:
            return False
        # unequal sizes need a unit to move from one group to another
        return not case.uneven or (
            case.rows % case.uneven == 0 and case.rows // case.uneven > case.groups
        )


def possible_layers() -> Iterator[Cell]:
    """List every possible layer of the whole grid; axes that are not crossed take their turn."""
    crossed = [axis for axis in CROSSED if axis in LAYER_AXES]
    for values in product(*(CROSSED[axis] for axis in crossed)):
        chosen: dict[str, Any] = dict(zip(crossed, values, strict=True))
        turn = zlib.crc32(repr(values).encode())
        scales, bias = TURNS["scales"], TURNS["bias"]
        chosen["scales"] = scales[turn % len(scales)]
        chosen["bias"] = bias[turn // len(scales) % len(bias)]
        chosen |= {axis: AXES[axis][0] for axis in INPUT_AXES}
        cell = Cell(**chosen)
        if cell.possible:
            yield cell


def cells_of(layer: Cell) -> Iterator[Cell]:
    """List every cell of one layer: each dtype and number of rows, views taking their turn."""
    views = AXES["view"]
    turn = zlib.crc32(str(layer).encode())
    for count, (dtype, rows) in enumerate(product(AXES["dtype"], AXES["rows"])):
        view = views[(turn + count) % len(views)]
        yield replace(layer, dtype=dtype, rows=rows, view=view)


def _group_size(group: Group, rows: int) -> int:
    if group == "none":
        return -1
    if group != "short":
        return int(group)
    power = 1 << (rows - 1).bit_length() - 1
    while rows % power == 0 and power > 1:
        power //= 2
    return power if power > 1 else rows * 3 // 4
