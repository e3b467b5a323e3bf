"""Lay a layer's tensors out for the kernel, on the device it will run on; imports torch.

`shape.py` says what the layout is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from gptq_loader_kernels.triton.shape import ONE_GROUP, Shape, power, unit_rows

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

__all__ = ["lay_out"]

PLANE = 5  # blocks in a plane of 3-bit words


def lay_out(
    layer: LayerSpec, packed: PackedLinear, device: str
) -> tuple[Shape, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Sort the rows by group and lay them out.

    Returns:
        The sizes; the words, int32 [word_rows, columns]; the table, int32 [table_rows,
        table_words, columns]; and the permutation of x, int32 [K], where rows were out of order.
    """
    permutation = packed.permutation()
    groups = packed.g_idx.long() if permutation is None else packed.g_idx.long()[permutation]
    shift = _shift(groups)
    shape = Shape.of(layer, group_shift=shift)
    codes = packed.codes().to(device)
    if permutation is not None:
        permutation = permutation.to(device, torch.int32)
        codes = codes.index_select(0, permutation)
    words = _words(codes, layer.bits, shape)
    table = _table(packed, groups[:: 1 << shift], shape).to(device)
    return shape, words, table, permutation


def _shift(groups: torch.Tensor) -> int:
    """Find how many rows, as a power of two, surely share a group: int64 [K], in order."""
    counts = torch.bincount(groups)
    counts = counts[counts > 0]
    if len(counts) == 1:
        return ONE_GROUP
    if bool((counts[:-1] == counts[0]).all()) and counts[-1] <= counts[0]:
        first = int(counts[0])
        if first & (first - 1) == 0:
            return power(first)
    return min(power(int(it)) for it in counts)


def _words(codes: torch.Tensor, bits: int, shape: Shape) -> torch.Tensor:
    """Pack codes, uint8 [K, N]."""
    rows, columns = codes.shape
    codes = functional.pad(codes, (0, shape.columns - columns, 0, shape.rows - rows))
    unit = unit_rows(bits)
    blocks = codes.view(-1, unit // 16, 8, 2, shape.columns)  # [units, blocks, pairs, halves, S]
    units, planes = blocks.shape[0], 3 if bits == 3 else 1
    words = torch.zeros(units, planes, 8, shape.columns, dtype=torch.int32, device=codes.device)
    for block in range(unit // 16):
        for half in range(2):
            code = blocks[:, block, :, half].to(torch.int32)
            if bits != 3:
                words[:, 0] |= code << (16 * half + bits * block)
            elif block < planes * PLANE:
                plane, place = divmod(block, PLANE)
                words[:, plane] |= code << (16 * half + bits * place)
            else:
                for plane in range(planes):
                    words[:, plane] |= ((code >> plane) & 1) << (16 * half + 15)
    return words.view(shape.word_rows, shape.columns)


def _table(packed: PackedLinear, groups: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Join scales and zeros of the groups, int64 [table rows or fewer]."""
    zeros, scales = packed.zeros[groups].to(torch.int32), packed.scales[groups].contiguous()
    if shape.table_words == 1:
        bits = scales.view(torch.int16).to(torch.int32) & 0xFFFF
        table = (bits | (zeros << 16))[:, None]
    else:
        table = torch.stack([scales.view(torch.int32), zeros], dim=1)
    missing = shape.columns - table.shape[2], shape.table_rows - table.shape[0]
    return functional.pad(table, (0, missing[0], 0, 0, 0, missing[1])).contiguous()
