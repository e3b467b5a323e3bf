"""Read a layer's g_idx and qzeros, once, and keep what the rest needs to know of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.checkpoint.tensor_info import DAMAGED
from gptq_loader_plugin.checkpoint.zeros import overwritten_words, stored_zeros
from gptq_loader_plugin.errors import CorruptCheckpoint
from gptq_loader_plugin.kernel.packing import CONTINUOUS_BITS

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
    from gptq_loader_plugin.checkpoint.tensors import TensorFiles
    from gptq_loader_plugin.checkpoint.zeros import StoredZeros, ZerosFormat
    from gptq_loader_plugin.kernel.packing import Layout

__all__ = ["LayerData", "LayerHeaders", "is_set", "read_layer_data"]


@dataclass(frozen=True, slots=True)
class LayerHeaders:
    """One layer's headers, and what they say by themselves."""

    name: str
    bits: int
    rows: int
    columns: int
    groups: int
    qzeros: TensorInfo
    g_idx: TensorInfo | None
    scales_dtype: str
    bias: bool

    def fits(self, group_size: int) -> bool:
        """Whether groups of this size make this many groups."""
        return -(-self.rows // group_size) == self.groups if group_size > 0 else self.groups == 1


@dataclass(frozen=True, slots=True)
class LayerData:
    """What one layer's g_idx and qzeros say, read once.

    Attributes:
        counts: the rows of every group, or None without a g_idx that says so.
        unset: whether there is a g_idx that was never filled in.
        ordered: whether groups follow one another.
        layout: how its fields lie in words.
        zeros: what qzeros hold as they are stored.
        ranges: the least and greatest true zero, by what the format would be.
        overwritten: whether an old packer has destroyed a word, if the format is v1.
    """

    counts: NDArray[np.int64] | None
    ordered: bool
    layout: Layout
    zeros: StoredZeros
    ranges: dict[ZerosFormat, tuple[int, int]]
    overwritten: bool
    unset: bool = False

    @property
    def largest_group(self) -> int | None:
        """The rows of the largest group, or None without a g_idx."""
        return None if self.counts is None else int(self.counts.max())


def is_set(g_idx: NDArray[np.integer[Any]], groups: int) -> bool:
    """Return whether a g_idx says anything: one that names one group of several does not."""
    if len(g_idx) == 0:
        return False
    return groups == 1 or not 0 <= g_idx[0] < groups or bool((g_idx != g_idx[0]).any())


def read_layer_data(
    layer: LayerHeaders, layout: Layout, tensors: TensorFiles, path: Path
) -> LayerData:
    """Read a layer's g_idx and qzeros, once, and keep what the rest needs to know of them."""
    counts, ordered = None, True
    g_idx = tensors.integers(layer.g_idx.name) if layer.g_idx else None
    unset = g_idx is not None and not is_set(g_idx, layer.groups)
    if layer.g_idx is not None and g_idx is not None and not unset:
        lowest, highest = int(g_idx.min()), int(g_idx.max())
        if lowest < 0 or highest >= layer.groups:
            raise CorruptCheckpoint(
                f"{layer.g_idx.name} names group {lowest if lowest < 0 else highest}; there are "
                f"{layer.groups} groups",
                path=path,
                tensor=layer.g_idx.name,
                hint=DAMAGED,
            )
        counts = np.bincount(g_idx, minlength=layer.groups)
        ordered = not bool((g_idx[1:] < g_idx[:-1]).any())
    qzeros, bits = tensors.integers(layer.qzeros.name), layer.bits
    zeros, ranges = stored_zeros(qzeros, bits=bits, layout=layout, columns=layer.columns)
    if bits not in CONTINUOUS_BITS:  # planar, which has no other format
        del ranges["v1"]
    return LayerData(
        counts=counts,
        ordered=ordered,
        layout=layout,
        zeros=zeros,
        ranges=ranges,
        overwritten=overwritten_words(qzeros, bits=bits) > 0,
        unset=unset,
    )
