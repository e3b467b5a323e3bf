"""Cut a layer into what one worker of a tensor parallel engine multiplies by, and join layers.

Columns are cut after the zeros are unpacked, so any cut is right. Rows are cut in the packed codes,
at whole words. A worker keeps the groups that its own rows are in, renumbered in the same order:
with act-order its rows may be of any group.
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

__all__ = ["Cut", "Piece", "Span", "cut_pieces", "describe", "even_cut", "join", "take"]

MOST_WORKERS = 64  # up to which the numbers that work are listed

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cut:
    """What one worker has of a layer of the model, which may stand for several of the checkpoint.

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
class Piece:
    """One layer of the checkpoint, as a worker takes it.

    Attributes:
        layer: the layer.
        parts: which parts of the model's layer it is: (0,) for q of q, k and v.
        columns: the columns to take, in order.
        rows: the rows to take.
    """

    layer: LayerSpec
    parts: tuple[int, ...]
    columns: tuple[Span, ...]
    rows: Span


def even_cut(
    widths: Sequence[int], *, columns: int, rank: int, workers: int
) -> tuple[tuple[int, ...], tuple[Span, ...]]:
    """Cut each part's columns evenly, unless the widths of one worker are all there are.

    Args:
        widths: the columns of each part on one worker.
        columns: the columns of the whole layer.
        rank: which worker.
        workers: of how many.

    Returns:
        The sizes of the whole parts, and this worker's columns of each.

    Raises:
        OptionInvalid: the columns are shared in another way.
    """
    if sum(widths) == columns:
        rank, workers = 0, 1
    if sum(widths) * workers != columns:
        raise OptionInvalid(
            f"{columns} columns are shared by {workers} workers as {list(widths)} each, which is "
            "no way to share that is known here",
            hint="use a tensor parallel size of 1",
        )
    spans = tuple((rank * width, (rank + 1) * width) for width in widths)
    return tuple(width * workers for width in widths), spans


def cut_pieces(layers: Sequence[LayerSpec], cut: Cut, *, path: Path) -> list[Piece]:
    """Find what a worker takes of each layer of the checkpoint.

    Args:
        layers: the checkpoint's layers that make up one of the model's, in order.
        cut: what the worker has of the model's.
        path: the checkpoint's, for messages.

    Raises:
        TensorMismatch: the layers' shapes are not the model's.
        OptionInvalid: the cut is inside a packed word.
    """
    pieces, part = [], 0
    for layer in layers:
        first, offset = part, 0
        columns: list[Span] = []
        while part < len(cut.sizes) and offset < layer.out_features:
            start, stop = cut.columns[part]
            columns.append((offset + start, offset + stop))
            offset += cut.sizes[part]
            part += 1
        if offset != layer.out_features or cut.inputs != layer.in_features:
            raise _another_shape(layer, cut, path)
        _check_words(layer, cut)
        pieces.append(Piece(layer, tuple(range(first, part)), tuple(columns), cut.rows))
    if part != len(cut.sizes):
        raise _another_shape(layers[-1], cut, path)
    return pieces


def take(packed: PackedLinear, piece: Piece) -> PackedLinear:
    """Take a worker's columns and rows of a layer, as a smaller layer in memory of its own."""
    columns = torch.cat([torch.arange(*span) for span in piece.columns])
    if len(columns) < piece.layer.out_features:
        packed = packed.take_columns(columns)
    start, stop = piece.rows
    if stop - start == piece.layer.in_features:
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
        (it.bits, it.layout, it.scales.dtype, it.scales.shape[0])
        == (first.bits, first.layout, first.scales.dtype, first.scales.shape[0])
        and torch.equal(it.g_idx, first.g_idx)
        for it in others
    )
    if not others or not same:
        return list(layers)
    biases = [
        torch.zeros(it.scales.shape[1], dtype=torch.float32) if it.bias is None else it.bias.float()
        for it in layers
    ]
    return [
        replace(
            first,
            qweight=torch.cat([it.qweight for it in layers], dim=1),
            zeros=torch.cat([it.zeros for it in layers], dim=1),
            scales=torch.cat([it.scales for it in layers], dim=1),
            bias=None if all(it.bias is None for it in layers) else torch.cat(biases),
        )
    ]


def describe(packed: PackedLinear, like: LayerSpec, *, name: str) -> LayerSpec:
    """Describe a layer that was cut or joined, for kernels to consider."""
    groups = packed.scales.shape[0]
    counts = torch.bincount(packed.g_idx.long(), minlength=groups)
    least, most = int(packed.zeros.min()), int(packed.zeros.max())
    return replace(
        like,
        name=name,
        in_features=len(packed.g_idx),
        out_features=packed.scales.shape[1],
        group_size=like.group_size if groups > 1 else -1,
        desc_act=packed.permutation() is not None,
        sym=least == most,
        groups=groups,
        group_rows=(int(counts.min()), int(counts.max())),
        group_unit=math.gcd(*counts.tolist()),
        zero_range=(least, most),
        bias=packed.bias is not None,
    )


def _check_words(layer: LayerSpec, cut: Cut) -> None:
    """Refuse a cut through a packed word."""
    codes = BLOCK if BLOCK % layer.bits else BLOCK // layer.bits  # that fill whole words
    if all(row % codes == 0 for row in cut.rows):
        return
    fitting = [
        str(workers)
        for workers in range(1, MOST_WORKERS + 1)
        if layer.in_features % workers == 0 and layer.in_features // workers % codes == 0
    ]
    raise OptionInvalid(
        f"{layer.name} has {layer.in_features} rows, and {cut.workers} workers would take "
        f"{layer.in_features // cut.workers} each; {layer.bits}-bit codes are packed {codes} rows "
        "at a time, and cannot be cut in between",
        hint=f"use a tensor parallel size of {' or '.join(fitting)}, as far as the model's heads "
        "allow it",
    )


def _another_shape(layer: LayerSpec, cut: Cut, path: Path) -> TensorMismatch:
    return TensorMismatch(
        f"{layer.name} is a layer of {layer.in_features}x{layer.out_features}; vLLM's model has "
        f"{cut.inputs} rows and {' + '.join(map(str, cut.sizes))} columns there",
        path=path,
        tensor=f"{layer.name}.qweight",
        hint="check that config.json is of this checkpoint",
    )
