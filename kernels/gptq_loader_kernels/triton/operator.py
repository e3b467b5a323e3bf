"""The product as an operator of torch, so that torch.compile traces through it; imports triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from triton import JITFunction

from gptq_loader_kernels.triton import matmul
from gptq_loader_kernels.triton.shape import STEP
from gptq_loader_kernels.triton.tiles import BUCKETS, Tile, bucket, fit

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["multiply_packed"]

FIELDS = 6  # of a Tile
# The bits of an exponent under which a code is the low part of a float's mantissa: 1024 + code in
# float16, 128 + code in bfloat16; in both halves of a word.
EXPONENTS = {torch.float16: 0x64006400, torch.bfloat16: 0x43004300}
SCALES = {"float16": tl.float16, "bfloat16": tl.bfloat16, "float32": tl.float32}
ADDED = 256  # elements of y that one program adds the parts of
ALIGNED = 16  # bytes, as Triton specialises for, and torch allocates


@torch.library.custom_op(
    "gptq_loader::multiply_packed",
    mutates_args=(),
    schema="(Tensor x, Tensor words, Tensor table, Tensor? bias, int bits, int out_features, "
    "int group_shift, str scales, int[] tiles, int multiprocessors, ScalarType dtype) -> Tensor",
)
def multiply_packed(
    x: torch.Tensor,
    words: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    out_features: int,
    group_shift: int,
    scales: str,
    tiles: Sequence[int],
    multiprocessors: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply x, float16 or bfloat16 [M, K], by a laid out weight; y [M, out_features]."""
    rows, in_features = x.shape
    y = torch.empty(rows, out_features, dtype=dtype, device=x.device)
    if rows == 0:
        return y
    if x.data_ptr() % ALIGNED:
        x = x.clone()
    at = BUCKETS.index(bucket(rows)) * FIELDS
    tile = Tile(*tiles[at : at + FIELDS])
    depth, span = fit(tile, bits, group_shift)
    steps = -(-in_features // STEP[bits]) * STEP[bits] // depth
    parts = tile.parts(rows, out_features, steps, multiprocessors)
    split = parts > 1
    sums = y
    if split:
        sums = torch.empty(parts, rows, out_features, dtype=torch.float32, device=x.device)
    multiply: Any = matmul.multiply
    add_parts: Any = matmul.add_parts
    with torch.cuda.device_of(x):
        multiply[(-(-rows // tile.block_m), -(-out_features // tile.block_n), parts)](
            x,
            words,
            table,
            bias,
            sums,
            rows,
            out_features,
            in_features,
            words.shape[1],
            steps,
            parts,
            group_shift,
            EXPONENTS[x.dtype],
            BITS=bits,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=depth,
            SPAN=span,
            SCALES=SCALES[scales],
            STAGES=tile.stages,
            BIAS=bias is not None and not split,
            INTERPRETED=not isinstance(multiply, JITFunction),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if split:
            size = rows * out_features
            add_parts[(-(-size // ADDED),)](
                sums, bias, y, size, out_features, parts, BIAS=bias is not None, BLOCK=ADDED
            )
    return y


@multiply_packed.register_fake
def _shape_of(
    x: torch.Tensor,
    words: torch.Tensor,
    table: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    out_features: int,
    group_shift: int,
    scales: str,
    tiles: Sequence[int],
    multiprocessors: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    del words, table, bias, bits, group_shift, scales, tiles, multiprocessors
    return x.new_empty(x.shape[0], out_features, dtype=dtype)
