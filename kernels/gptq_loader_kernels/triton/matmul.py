"""The Triton kernels: decode packed codes inside the matmul; add its parts up. Imports triton.

Rows of the weight are sorted by group and laid out by `layout.py` in units of sixteen rows a
block: a word holds the codes of two neighbouring rows, one in each half, of several blocks. So one
32-bit load, a shift and a mask give two neighbouring codes ready for a tensor core's register;
putting them beside an exponent makes them 16-bit floats, and one packed subtraction takes the
zero away. Codes minus zeros are small integers, exact in float16 and bfloat16; the scale
multiplies the float32 sum of a group's rows. Nothing is rounded before that sum but x itself.

The weight is the left operand, y.T = W @ x.T: from registers on every GPU, Hopper's too.
"""

# Triton compiles these functions: its loops and constants have no Python types.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_parts", "multiply"]

# Numbers that vary from call to call are kept out of what Triton specialises code for.
VARYING = ["M", "TILES", "PARTS", "GROUP_SHIFT", "EXPONENT"]
# Triton before 3.7 has each thread load sixteen zeros one at a time, unless there are as many as
# words: a step takes 295 instructions on sm90, and 230 with zeros repeated. Later versions load
# them once, and take ten instructions more with zeros repeated.
VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
REPEAT_ZEROS = tl.constexpr(VERSION < (3, 7))


@triton.jit(do_not_specialize=VARYING)
def multiply(  # noqa: PLR0913, PLR0917, ANN201 - a kernel's arguments
    x,  # noqa: ANN001 - float16 or bfloat16 [M, K]
    words,  # noqa: ANN001 - int32 [padded K / UNIT, PLANES, 8, S]
    table,  # noqa: ANN001 - int32 [G, S], a scale's bits and a zero; [G, 2, S] for float32 scales
    bias,  # noqa: ANN001 - float32 [N]; not read unless BIAS
    y,  # noqa: ANN001 - [M, N], or where PARTS > 1, float32 [PARTS, M, N]
    M,  # noqa: ANN001, N803 - rows of x
    N,  # noqa: ANN001, N803 - columns of the weight
    K,  # noqa: ANN001, N803 - rows of the weight
    S,  # noqa: ANN001, N803 - columns of the tables, those of joined layers too
    TILES,  # noqa: ANN001, N803 - padded K / BLOCK_K
    PARTS,  # noqa: ANN001, N803 - programs that share a tile's rows of the weight
    GROUP_SHIFT,  # noqa: ANN001, N803 - a group of the tables has 2**GROUP_SHIFT rows
    EXPONENT,  # noqa: ANN001, N803 - `EXPONENTS` of the dtype of x, in both halves
    BITS: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803 - rows of a tile that surely share a group
    SCALES: tl.constexpr,  # noqa: N803 - the scales' dtype; float32 makes a table twice as large
    STAGES: tl.constexpr,  # noqa: N803 - loads in flight: of the table too, which num_stages forgets
    BIAS: tl.constexpr,  # noqa: N803
    INTERPRETED: tl.constexpr,  # noqa: N803 - whether the interpreter runs it
):
    """Compute one tile [BLOCK_M, BLOCK_N] of y, or of one part of it."""
    UNIT: tl.constexpr = 256 if BITS == 3 else 256 // BITS  # noqa: N806
    ROWS: tl.constexpr = 24 if BITS == 3 else 8  # noqa: N806 - rows of words in a unit
    # Rows of one dot product, the least of four. In Triton 3.5, torch 2.9's, a min is no constant.
    SHORTER: tl.constexpr = SPAN if SPAN < UNIT else UNIT  # noqa: N806, FURB136
    HALF: tl.constexpr = 64 if BLOCK_K > 128 else BLOCK_K // 2  # noqa: N806
    DEPTH: tl.constexpr = SHORTER if SHORTER < HALF else HALF  # noqa: N806, FURB136
    # As often as words are; of 3 bits, and of small groups, they would not fit into shared memory.
    REPEATED: tl.constexpr = 8 if REPEAT_ZEROS and SPAN >= 64 and BITS != 3 else 1  # noqa: N806
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    depth = tl.arange(0, DEPTH)
    in_rows = (rows < M)[None, :]
    in_columns = columns < S
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    words_at = words + columns[:, None] + tl.arange(0, 8)[None, :] * S
    x_at = x + rows[None, :] * K + depth[:, None]
    for tile in tl.range(part, TILES, PARTS, num_stages=STAGES):
        for span in tl.static_range(BLOCK_K // SPAN):
            group = (tile * BLOCK_K + span * SPAN) >> GROUP_SHIFT
            if tl.float32 == SCALES:
                at = table + group * 2 * S + columns
                zeros_at = (at + S)[:, None] + tl.zeros((1, REPEATED), tl.int32)
                zero = tl.load(zeros_at, mask=in_columns[:, None], other=0)
                scale = tl.load(at, mask=in_columns, other=0).to(tl.float32, bitcast=True)
            else:
                at = table + group * S + columns
                zeros_at = at[:, None] + tl.zeros((1, REPEATED), tl.int32)
                zero = tl.load(zeros_at, mask=in_columns[:, None], other=0) >> 16
                both = tl.load(at, mask=in_columns, other=0)
                scale = both.to(tl.int16).to(SCALES, bitcast=True).to(tl.float32)
            partial = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for piece in tl.static_range(SPAN // DEPTH):
                inner = span * SPAN + piece * DEPTH
                row = tile * BLOCK_K + inner
                if BLOCK_K < UNIT:  # a tile lies in one unit, whose words are loaded once
                    unit = tile * BLOCK_K // UNIT
                    first = (tile * BLOCK_K % UNIT + inner) // 16
                else:
                    unit = tile * (BLOCK_K // UNIT) + inner // UNIT
                    first = (span * SPAN + piece * DEPTH) % UNIT // 16
                weights = _decode(
                    words_at + unit * (ROWS * S),
                    S,
                    in_columns[:, None],
                    zero,
                    EXPONENT,
                    x.dtype.element_ty,
                    BITS,
                    BLOCK_N,
                    DEPTH // 16,
                    first,
                    INTERPRETED,
                )
                inside = in_rows & (depth < K - row)[:, None]
                values = tl.load(x_at + row, mask=inside, other=0)
                if INTERPRETED:  # which multiplies the bits of a bfloat16
                    weights, values = weights.to(tl.float32), values.to(tl.float32)
                partial = tl.dot(weights, values, partial)
            total += partial * scale[:, None]
    in_columns = columns < N
    if BIAS:
        total += tl.load(bias + columns, mask=in_columns, other=0)[:, None]
    at = (part.to(tl.int64) * M + rows)[None, :] * N + columns[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=in_columns[:, None] & in_rows)


@triton.jit
def _decode(  # noqa: ANN202 - a kernel's arguments
    words_at,  # noqa: ANN001 - pointers [BLOCK_N, 8]
    S,  # noqa: ANN001, N803
    mask,  # noqa: ANN001 - [BLOCK_N, 1]
    zero,  # noqa: ANN001 - int32 [BLOCK_N, 1 or 8]
    EXPONENT,  # noqa: ANN001, N803
    DTYPE: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCKS: tl.constexpr,  # noqa: N803 - blocks of sixteen rows to decode
    first,  # noqa: ANN001 - the first of them in the unit
    INTERPRETED: tl.constexpr,  # noqa: N803
):
    """Decode codes minus zeros: DTYPE [BLOCK_N, BLOCKS * 16]."""
    FIELD: tl.constexpr = ((1 << BITS) - 1) * 0x00010001  # noqa: N806
    block = (first + tl.arange(0, BLOCKS))[None, :, None]
    words = tl.load(words_at, mask=mask, other=0)[:, None, :]
    if BITS == 3:  # five blocks in each of three planes; the halves' last bits are the sixteenth
        second = tl.load(words_at + 8 * S, mask=mask, other=0)[:, None, :]
        third = tl.load(words_at + 16 * S, mask=mask, other=0)[:, None, :]
        plane = tl.where(block < 5, words, tl.where(block < 10, second, third))
        last = (words >> 15) & 0x00010001
        last |= (second >> 14) & 0x00020002
        last |= (third >> 13) & 0x00040004
        pairs = tl.where(block == 15, last, plane >> (block % 5 * 3))
    else:
        pairs = words >> (block * BITS)
    if BITS == 8 and tl.bfloat16 == DTYPE:  # which has seven bits of mantissa: through float32
        codes = tl.join(pairs & 0xFF, (pairs >> 16) & 0xFF) | 0x4B000000  # 2**23, the exponent
        taken = zero[:, None, :, None] | 0x4B000000
        weights = codes.to(tl.float32, bitcast=True) - taken.to(tl.float32, bitcast=True)
        weights = weights.to(DTYPE)
    else:
        taken = ((zero * 0x00010001) | EXPONENT)[:, None, :]
        if INTERPRETED:
            pairs = (pairs & FIELD) | EXPONENT
            less = _halves(pairs, DTYPE).to(tl.float32) - _halves(taken, DTYPE).to(tl.float32)
            weights = less.to(DTYPE)
        else:
            weights = _halves(_subtract(pairs, taken, FIELD, EXPONENT, DTYPE), DTYPE)
    return tl.reshape(weights, (BLOCK_N, BLOCKS * 16))


@triton.jit
def _halves(pairs, DTYPE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Take words as pairs of 16-bit floats, in a new last dimension."""
    return tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16)).to(DTYPE, bitcast=True)


@triton.jit
def _subtract(  # noqa: ANN202
    pairs,  # noqa: ANN001
    taken,  # noqa: ANN001
    FIELD: tl.constexpr,  # noqa: N803
    EXPONENT,  # noqa: ANN001, N803
    DTYPE: tl.constexpr,  # noqa: N803
):
    """Mask two codes, make floats of them and subtract, in the two instructions it takes.

    Triton would make seven of it, one half at a time. The interpreter cannot run this; beside the
    call stands the same in words it can.
    """
    pairs, taken = tl.broadcast(pairs, taken)
    field = tl.full(pairs.shape, FIELD, tl.int32)
    exponent = tl.zeros_like(pairs) + EXPONENT
    if tl.bfloat16 == DTYPE:  # subtraction came with sm90; x * 1 - y with sm80
        floats = tl.inline_asm_elementwise(
            "{ .reg .b32 t; lop3.b32 t, $1, $3, $4, 0xEA; fma.rn.bf16x2 $0, t, $5, $2; }",
            "=r,r,r,r,r,r",
            [
                pairs,
                taken ^ -0x7FFF8000,
                field,
                exponent,
                tl.full(pairs.shape, 0x3F803F80, tl.int32),
            ],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        floats = tl.inline_asm_elementwise(
            "{ .reg .b32 t; lop3.b32 t, $1, $3, $4, 0xEA; sub.rn.f16x2 $0, t, $2; }",
            "=r,r,r,r,r",
            [pairs, taken, field, exponent],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return floats


@triton.jit(do_not_specialize=["SIZE", "PARTS"])
def add_parts(  # noqa: ANN201 - a kernel's arguments
    parts,  # noqa: ANN001 - float32 [PARTS, SIZE], SIZE = M * N
    bias,  # noqa: ANN001 - float32 [N]; not read unless BIAS
    y,  # noqa: ANN001 - [SIZE]
    SIZE,  # noqa: ANN001, N803
    N,  # noqa: ANN001, N803
    PARTS,  # noqa: ANN001, N803
    BIAS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """Add the parts in their order, so that the same x gives the same y to the last bit."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(PARTS):
        total += tl.load(parts + part * SIZE.to(tl.int64) + at, mask=inside, other=0)
    if BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
