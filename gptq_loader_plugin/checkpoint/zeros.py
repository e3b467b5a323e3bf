"""Turn stored zeros into true ones, in one place.

Format v1 (`gptq`, and every file from before the field existed) stores zero - 1; v2 (`gptq_v2`)
and planar (`gptq_p`) store zero. With 2, 4 and 8 bits the writers of v1 subtracted one from every
field of a 32-bit word *at once*, with borrow: a true [0, 5] is stored as [15, 3]. Adding the same
constant to the word, modulo 2**32, restores it. With 3 bits each field wraps by itself.

Labels lie: checkpoints say `gptq` and store v2, and the reverse. What the zeros say wins:
symmetric zeros are all 2**(bits-1) true, and asymmetric ones half a step below on average, the
middle of 0..2**bits-1, so the mean of what is stored tells the two apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from gptq_loader_plugin.kernel.packing import unpack_columns

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from gptq_loader_plugin.kernel.packing import Layout

__all__ = [
    "StoredZeros",
    "ZerosFormat",
    "decide_format",
    "lost_columns",
    "overwritten_words",
    "stored_zeros",
    "true_zeros",
]

ZerosFormat = Literal["v1", "v2"]

ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # one in every field of a word
V2_ABOVE = 0.5  # of the mean of stored zeros above v1's: 0 stands for v1 and 1 for v2
CLEARLY = 0.25  # so far from that a label is overruled
ENOUGH_ZEROS = 1_000  # fewer than this do not overrule a label
# 8-bit zeros lie so far apart that those of a small layer may mean nothing: a label is overruled by
# what is further off than chance may account for, in standard errors of the mean, and without one
# v2 must be e**4.6, a hundred times, as likely, for whoever writes v2 says so.
CHANCE = 2.5
ODDS = 4.6


@dataclass(frozen=True, slots=True)
class StoredZeros:
    """What one layer's qzeros hold, in sum.

    Attributes:
        bits: the width of a field.
        count: how many zeros there are.
        total: their sum, as stored.
        squares: the sum of their squares.
        minimum: the smallest, as stored.
        maximum: the largest, as stored.
    """

    bits: int
    count: int
    total: int
    squares: int
    minimum: int
    maximum: int


def decide_format(
    layers: Iterable[StoredZeros], *, label: str | None
) -> tuple[ZerosFormat, str | None]:
    """Decide whether zeros are stored as v1 or v2, over all layers together.

    Args:
        layers: what each layer stores; layers whose format is fixed (planar) left out.
        label: the config's `checkpoint_format`, or None.

    Returns:
        The format, and a warning where it contradicts the label.
    """
    layers = list(layers)
    labelled: ZerosFormat | None = None if label is None else ("v2" if label == "gptq_v2" else "v1")
    count = sum(layer.count for layer in layers)
    if not count:
        return labelled or "v1", None
    middle = {layer.bits: 1 << (layer.bits - 1) for layer in layers}
    if all(layer.minimum == layer.maximum == middle[layer.bits] for layer in layers):
        inferred: ZerosFormat = "v2"
    elif all(layer.minimum == layer.maximum == middle[layer.bits] - 1 for layer in layers):
        inferred = "v1"
    else:
        above = sum(layer.total - _mean_v1(layer) * layer.count for layer in layers) / count
        error = _error(layers, count)
        threshold = V2_ABOVE if labelled else V2_ABOVE + ODDS * error**2
        inferred = "v2" if above > threshold else "v1"
        unsure = abs(above - V2_ABOVE) <= max(CLEARLY, CHANCE * error) or count < ENOUGH_ZEROS
        if labelled is not None and inferred != labelled and unsure:
            return labelled, None
    if labelled is None or inferred == labelled:
        return inferred, None
    names = {"v1": "gptq (zero - 1)", "v2": "gptq_v2 (zero)"}
    return inferred, (
        f"the config says zeros are stored as {names[labelled]}; the zeros themselves are "
        f"{names[inferred]}, and they win"
    )


def _mean_v1(zeros: StoredZeros) -> float:
    """Return what a layer's zeros are on average where they are stored as v1."""
    middle = 1 << (zeros.bits - 1)
    return middle - 1 if zeros.minimum == zeros.maximum else middle - 1.5


def _error(layers: Iterable[StoredZeros], count: int) -> float:
    """Return the standard error of the mean of stored zeros, as far as each is drawn by itself."""
    spread = (
        sum(layer.squares - layer.total * layer.total / layer.count for layer in layers) / count
    )
    return math.sqrt(max(spread, 0.0) / count)


def stored_zeros(
    qzeros: NDArray[np.int32], *, bits: int, layout: Layout, columns: int
) -> tuple[StoredZeros, dict[ZerosFormat, tuple[int, int]]]:
    """Sum up what a layer's qzeros hold.

    Args:
        qzeros: int32 [groups, words].
        bits: the width of a field.
        layout: how fields lie in words.
        columns: out_features.

    Returns:
        What they hold as they are stored; and the least and the greatest true zero, by what the
        format would be, where `lost_columns` are symmetric.
    """
    groups, times = _different_groups(qzeros)
    lost = lost_columns(qzeros.shape[1], bits=bits, columns=columns)
    counts = _count_fields(groups, bits, layout, columns - lost)
    values = np.arange(len(counts))
    total, squares = int(counts @ values) * times, int(counts @ (values * values)) * times
    least, greatest = _range(counts)
    stored = StoredZeros(bits, int(counts.sum()) * times, total, squares, least, greatest)
    ranges: dict[ZerosFormat, tuple[int, int]] = {"v2": (least, greatest)}
    if bits not in ONES:
        ranges["v1"] = _range(np.roll(counts, 1))
    elif not counts[-1]:  # nothing was borrowed
        ranges["v1"] = least + 1, greatest + 1
    else:
        for part in (groups[:1], groups):  # one group may have every value already
            words = (part.view(np.uint32) + np.uint32(ONES[bits])).view(np.int32)
            ranges["v1"] = _range(_count_fields(words, bits, layout, columns - lost))
            if ranges["v1"] == (0, len(counts) - 1):
                break
    if lost:
        middle = 1 << (bits - 1)
        ranges = {how: (min(at[0], middle), max(at[1], middle)) for how, at in ranges.items()}
    return stored, ranges


def _range(counts: NDArray[np.int64]) -> tuple[int, int]:
    """Return the least and the greatest value that occurs."""
    there = np.flatnonzero(counts)
    return int(there[0]), int(there[-1])


def _count_fields(
    words: NDArray[np.int32], bits: int, layout: Layout, columns: int
) -> NDArray[np.int64]:
    """Count how often each value stands in the first columns of words: int64 [2**bits].

    Fields that fill the words are counted as they lie, 16 bits at a time: a tenth of the time that
    unpacking takes (80 layers of a 70B model, groups of 128: 6.1 s of one EPYC core, now 0.5 s).
    """
    if bits in ONES and words.shape[1] * 32 == columns * bits:
        counts = np.bincount(words.view(np.uint16).ravel(), minlength=1 << 16)
        width = 16
        while width > bits:  # of the lower half of each number, and of the upper
            width //= 2
            halves = counts.reshape(1 << width, 1 << width)
            counts = halves.sum(axis=0) + halves.sum(axis=1)
        return counts
    fields = unpack_columns(words, bits, layout, columns)
    return np.bincount(fields.ravel(), minlength=1 << bits)


def true_zeros(
    qzeros: NDArray[np.int32],
    *,
    bits: int,
    layout: Layout,
    columns: int,
    zeros_format: ZerosFormat,
) -> NDArray[np.uint8]:
    """Unpack a qzeros into true zeros.

    Where the writer dropped a last, partial word (columns * bits is not a multiple of 32), the
    missing zeros of a symmetric layer are known, and `lost_columns` says when they are not.

    Args:
        qzeros: int32 [groups, columns * bits / 32 rounded down].
        bits: the width of a field.
        layout: how fields lie in words.
        columns: out_features.
        zeros_format: "v1" where zero - 1 is stored.

    Returns:
        uint8 [groups, columns], each 0..2**bits - 1.
    """
    words, times = _different_groups(qzeros)
    if zeros_format == "v1" and bits in ONES:
        words = (words.view(np.uint32) + np.uint32(ONES[bits])).view(np.int32)
    zeros = unpack_columns(words, bits, layout, columns)
    if zeros_format == "v1" and bits not in ONES:
        zeros = (zeros + np.uint8(1)) & np.uint8((1 << bits) - 1)
    if lost := lost_columns(qzeros.shape[1], bits=bits, columns=columns):
        zeros[:, columns - lost :] = 1 << (bits - 1)
    return np.repeat(zeros, times, axis=0) if times > 1 else zeros


def lost_columns(words: int, *, bits: int, columns: int) -> int:
    """Count the last columns whose zeros the writer dropped with a partial word."""
    return max(columns - words * 32 // bits, 0)


def _different_groups(qzeros: NDArray[np.int32]) -> tuple[NDArray[np.int32], int]:
    """Return one group, and how often, where all are alike, as in a symmetric layer; else all."""
    alike = len(qzeros) > 1 and bool((qzeros[-1] == qzeros[0]).all())  # else quickly told
    if alike and bool((qzeros[1:] == qzeros[0]).all()):
        return np.ascontiguousarray(qzeros[:1]), len(qzeros)
    return np.ascontiguousarray(qzeros), 1


def overwritten_words(qzeros: NDArray[np.int32], *, bits: int) -> int:
    """Count the words of a v1 file that an old packer filled with ones, whose zeros are lost.

    GPTQ-for-LLaMa, and AutoGPTQ before v2 existed, wrote a true zero of 0 as -1 OR-ed into the
    word, which set every higher field too. A word with the upper half all ones is such a word: a
    run of that many zeros of 0 does not occur in weights.
    """
    if bits not in ONES:
        return 0
    words = np.ascontiguousarray(qzeros).view(np.uint32)
    return int(np.count_nonzero(words >= np.uint32(0xFFFF0000)))
