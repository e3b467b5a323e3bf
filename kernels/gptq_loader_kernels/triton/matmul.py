"""The Triton kernel: decode packed codes inside the matmul. Imports triton.

Rows of the weight are sorted by group beforehand, so a tile of BLOCK_K rows lies in one group: its
zeros and scales are one row each, and the scale multiplies the tile's product instead of its
weights. Codes minus zeros are small integers, exact in float16 and bfloat16, so nothing is rounded
before the float32 sum but x itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["matmul"]


@triton.jit  # pyright: ignore[reportAttributeAccessIssue]
def matmul(  # noqa: PLR0913, PLR0917, ANN201 - a kernel's arguments
    x,  # noqa: ANN001 - [M, K]
    words,  # noqa: ANN001 - int32 [K * BITS / 32, N]
    zeros,  # noqa: ANN001 - uint8 [G, N]
    scales,  # noqa: ANN001 - float [G, N]
    tile_groups,  # noqa: ANN001 - int32 [K / BLOCK_K], the group of each tile of rows
    y,  # noqa: ANN001 - float32 [SPLIT_K, M, N], a partial sum for each part of K
    M,  # noqa: ANN001, N803 - rows of x
    N,  # noqa: ANN001, N803 - columns of the weight
    K,  # noqa: ANN001, N803 - rows of the weight
    BITS: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    SPLIT_K: tl.constexpr,  # noqa: N803
):
    """Compute one tile [BLOCK_M, BLOCK_N] of one part of x @ W."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    depth = tl.arange(0, BLOCK_K)
    in_rows = rows < M
    in_columns = columns < N
    mask: tl.constexpr = (1 << BITS) - 1
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tile in range(part, K // BLOCK_K, SPLIT_K):
        k = tile * BLOCK_K + depth
        bit = k * BITS
        word = bit // 32
        shift = bit % 32
        at = word[:, None] * N + columns[None, :]
        packed = tl.load(words + at, mask=in_columns[None, :], other=0)
        codes = packed >> shift[:, None]
        if BITS == 3:  # codes 10 and 21 of each 32 go on in the next word
            split = shift + BITS > 32
            after = tl.load(words + at + N, mask=split[:, None] & in_columns[None, :], other=0)
            # a right shift of int32 drags the sign along: what it drags in is masked off first
            codes = tl.where(
                split[:, None],
                (codes & ((1 << (32 - shift)) - 1)[:, None]) | (after << (32 - shift)[:, None]),
                codes,
            )
        codes = codes & mask
        group = tl.load(tile_groups + tile)
        zero = tl.load(zeros + group * N + columns, mask=in_columns, other=0).to(tl.int32)
        scale = tl.load(scales + group * N + columns, mask=in_columns, other=0).to(tl.float32)
        values = tl.load(x + rows[:, None] * K + k[None, :], mask=in_rows[:, None], other=0)
        weights = (codes - zero[None, :]).to(values.dtype)
        total += tl.dot(values, weights) * scale[None, :]
    out = y + part * M * N + rows[:, None] * N + columns[None, :]
    tl.store(out, total, mask=in_rows[:, None] & in_columns[None, :])
