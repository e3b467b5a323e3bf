"""How a layer's tensors are laid out for the kernel, as sizes alone. Imports nothing heavy.

*words*: rows of the weight are taken in units of sixteen rows a block. A 32-bit word holds codes of
two neighbouring rows, 2i in its low half and 2i + 1 in its high half, of as many blocks as fit:
two at 8 bits, four at 4, eight at 2. At 3 bits a unit is sixteen blocks in three planes of words,
five blocks in each; the sixteenth block's three bits are the halves' last ones. K is padded to
whole steps of the kernel, N to whole vectors. Of joined layers the rows lie side by side, and a
kernel reads one layer's columns of them.

*table*: a row for each group, one 32-bit word for each column: the scale's 16 bits, and above them
the zero. Scales in float32 take a row of their own before that of the zeros. Where groups are not
of one power of two, a row stands for as many rows as divide every group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["VECTOR", "Shape", "unit_rows"]

VECTOR = 32  # columns: whole 128-byte lines of words
STEP = {2: 128, 3: 256, 4: 128, 8: 128}  # rows: the most that one step of the kernel takes
ONE_GROUP = 30  # the shift that sends every row to group 0


def unit_rows(bits: int) -> int:
    """Count the rows of the weight in a unit."""
    return 256 if bits == 3 else 256 // bits


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a prepared layer.

    Attributes:
        rows: K, padded.
        columns: N, padded.
        word_rows: rows of words.
        group_shift: a row of the table stands for 2**group_shift rows of the weight.
        table_rows: rows of the table.
        table_words: 1, or 2 where scales are float32.
    """

    rows: int
    columns: int
    word_rows: int
    group_shift: int
    table_rows: int
    table_words: int

    @classmethod
    def of(cls, layer: LayerSpec, *, group_shift: int | None = None) -> Shape:
        """Work the sizes out; the groups are thought even unless their shift is given."""
        rows = -(-layer.in_features // STEP[layer.bits]) * STEP[layer.bits]
        shift = usual_shift(layer) if group_shift is None else group_shift
        return cls(
            rows=rows,
            columns=-(-layer.out_features // VECTOR) * VECTOR,
            word_rows=rows // unit_rows(layer.bits) * (24 if layer.bits == 3 else 8),
            group_shift=shift,
            table_rows=-(-rows // (1 << shift)),
            table_words=2 if layer.scales_dtype == "float32" else 1,
        )

    def bytes(self, layer: LayerSpec) -> int:
        """Count what a prepared layer takes in memory."""
        words = 4 * self.columns * (self.word_rows + self.table_words * self.table_rows)
        permutation = 4 * layer.in_features if layer.desc_act and layer.groups > 1 else 0
        return words + permutation + (4 * layer.out_features if layer.bias else 0)

    def dequantized_bytes(self, layer: LayerSpec) -> int:
        """Count what the layer's weight takes in 16 bits, while it is multiplied by."""
        return 2 * layer.in_features * self.columns


def usual_shift(layer: LayerSpec) -> int:
    """Guess from its headers how many rows share a row of the layer's table."""
    largest = layer.group_rows[1]
    if layer.groups == 1:
        return ONE_GROUP
    even = layer.groups == -(-layer.in_features // largest)  # all but the last
    return power(largest if even and largest & (largest - 1) == 0 else layer.group_unit)


def power(rows: int) -> int:
    """Give the power of two that divides `rows`, as a shift."""
    return (rows & -rows).bit_length() - 1
