"""Slice a layer for one worker of a tensor parallel engine, and join layers.

Columns are sliced after the zeros are unpacked, so at any column. Rows are sliced in the packed
codes, at whole words. A worker has the groups that its own rows are in, renumbered in the same
order: with act-order its rows may be of any group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from gptq_loader_plugin.errors import OptionInvalid, TensorMismatch
from gptq_loader_plugin.kernel.packing import BLOCK

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

__all__ = [
    "LayerSlice",
    "Partition",
    "Span",
    "describe",
    "even_partition",
    "join",
    "slice_layers",
    "slice_packed",
]

MAX_WORKERS = 64  # up to which the sizes that work are listed

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Partition:
    """One worker's part of a layer of the model, which may be several layers of the checkpoint.

    Attributes:
        inputs: the rows of the whole layer.
        sizes: the columns of each part (q, k and v), over all workers.
        columns: this worker's columns of each part, first and last + 1.
        rows: this worker's rows.
        workers: how many workers share the layer.
    """

    inputs: int
    sizes: tuple[int, ...]
    columns: tuple[Span, ...]
    rows: Span
    workers: int = 1


@dataclass(frozen=True, slots=True)
class LayerSlice:
    """One worker's part of a layer of the checkpoint.

    Attributes:
        layer: the layer.
        parts: which parts of the model's layer it is: (0,) for q of q, k and v.
        columns: the worker's columns, in order.
        rows: the worker's rows.
    """

    layer: LayerSpec
    parts: tuple[int, ...]
    columns: tuple[Span, ...]
    rows: Span


def even_partition(
    widths: Sequence[int], *, columns: int, rank: int, workers: int
) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    """Partition each part's columns evenly, unless one worker has them all.

    Args:
        widths: the columns of each part on one worker.
        columns: the columns of the whole layer.
        rank: the worker.
        workers: how many there are.

    Returns:
        The sizes of the whole parts, and this worker's columns of each.

    Raises:
        OptionInvalid: the columns are not partitioned evenly.
    """
    if sum(widths) == columns:
        rank, workers = 0, 1
    if sum(widths) * workers != columns:
        raise OptionInvalid(
            f"{workers} workers have {list(widths)} of {columns} columns each, which is not an "
            "even partition",
            hint="use a tensor parallel size of 1",
        )
    spans = tuple((rank * width, (rank + 1) * width) for width in widths)
    return tuple(width * workers for width in widths), spans


def slice_layers(
    layers: Sequence[LayerSpec], partition: Partition, *, path: Path
) -> list[LayerSlice]:
    """Return the worker's slice of each layer of the checkpoint.

    Args:
        layers: the checkpoint's layers that make up one of the model's, in order.
        partition: the worker's part of the model's layer.
        path: the checkpoint's, for messages.

    Raises:
        TensorMismatch: the layers' shapes are not the model's.
        OptionInvalid: a boundary is inside a packed word.
    """
    slices, part = [], 0
    for layer in layers:
        first, offset = part, 0
        columns: list[Span] = []
        while part < len(partition.sizes) and offset < layer.out_features:
            start, stop = partition.columns[part]
            columns.append((offset + start, offset + stop))
            offset += partition.sizes[part]
            part += 1
        if offset != layer.out_features or partition.inputs != layer.in_features:
            raise _shape_mismatch(layer, partition, path)
        _check_words(layer, partition)
        parts = tuple(range(first, part))
        slices.append(LayerSlice(layer, parts, tuple(columns), partition.rows))
    if part != len(partition.sizes):
        raise _shape_mismatch(layers[-1], partition, path)
    return slices


def slice_packed(packed: PackedLinear, layer_slice: LayerSlice) -> PackedLinear:
    """Return a worker's columns and rows of a layer, as a smaller layer in memory of its own."""
    columns = torch.cat([torch.arange(*span) for span in layer_slice.columns])
    if len(columns) < layer_slice.layer.out_features:
        packed = packed.take_columns(columns)
    start, stop = layer_slice.rows
    if stop - start == layer_slice.layer.in_features:
        return packed
    used, g_idx = torch.unique(packed.g_idx[start:stop], return_inverse=True)
    words = slice(start * packed.bits // 32, stop * packed.bits // 32)
    return replace(
        packed,
        qweight=packed.qweight[words].clone(),
        zeros=packed.zeros[used],
        scales=packed.scales[used],
        g_idx=g_idx.to(torch.int32),
    )


def join(layers: Sequence[PackedLinear]) -> list[PackedLinear]:
    """Join layers of the same input into one, side by side, where they have the same groups."""
    first, *others = layers
    same = all(
        (other.bits, other.layout, other.scales.dtype, other.scales.shape[0])
        == (first.bits, first.layout, first.scales.dtype, first.scales.shape[0])
        and torch.equal(other.g_idx, first.g_idx)
        for other in others
    )
    if not others or not same:
        return list(layers)
    biases = [
        torch.zeros(layer.scales.shape[1], dtype=torch.float32)
        if layer.bias is None
        else layer.bias.float()
        for layer in layers
    ]
    return [
        replace(
            first,
            qweight=torch.cat([layer.qweight for layer in layers], dim=1),
            zeros=torch.cat([layer.zeros for layer in layers], dim=1),
            scales=torch.cat([layer.scales for layer in layers], dim=1),
            bias=None if all(layer.bias is None for layer in layers) else torch.cat(biases),
        )
    ]


def describe(packed: PackedLinear, like: LayerSpec, *, name: str) -> LayerSpec:
    """Describe a layer that was sliced or joined, for kernels to consider."""
    groups = packed.scales.shape[0]
    counts = torch.bincount(packed.g_idx.long(), minlength=groups)
    min_zero, max_zero = int(packed.zeros.min()), int(packed.zeros.max())
    return replace(
        like,
        name=name,
        in_features=len(packed.g_idx),
        out_features=packed.scales.shape[1],
        group_size=like.group_size if groups > 1 else -1,
        desc_act=packed.permutation() is not None,
        sym=min_zero == max_zero,
        groups=groups,
        group_rows=(int(counts.min()), int(counts.max())),
        group_unit=math.gcd(*counts.tolist()),
        zero_range=(min_zero, max_zero),
        bias=packed.bias is not None,
    )


def _check_words(layer: LayerSpec, partition: Partition) -> None:
    """Refuse a boundary inside a packed word."""
    codes = BLOCK if BLOCK % layer.bits else BLOCK // layer.bits  # that fill whole words
    if all(row % codes == 0 for row in partition.rows):
        return
    fitting = [
        str(workers)
        for workers in range(1, MAX_WORKERS + 1)
        if layer.in_features % workers == 0 and layer.in_features // workers % codes == 0
    ]
    raise OptionInvalid(
        f"{layer.name} has {layer.in_features} rows, {layer.in_features // partition.workers} for "
        f"each of {partition.workers} workers; {layer.bits}-bit codes are packed {codes} rows at a "
        "time, and cannot be split in between",
        hint=f"use a tensor parallel size of {' or '.join(fitting)}, if the model's heads allow it",
    )


def _shape_mismatch(layer: LayerSpec, partition: Partition, path: Path) -> TensorMismatch:
    sizes = " + ".join(map(str, partition.sizes))
    return TensorMismatch(
        f"{layer.name} is a layer of {layer.in_features}x{layer.out_features}; vLLM's model has "
        f"{partition.inputs} rows and {sizes} columns there",
        path=path,
        tensor=f"{layer.name}.qweight",
        hint="check that config.json belongs to this checkpoint",
    )
