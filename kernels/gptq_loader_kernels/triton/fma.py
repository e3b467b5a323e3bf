"""The Triton kernels without tensor cores: few rows by multiply-add, or dequantise. Imports triton.

They read the words and the table that `matmul.py` reads (`shape.py` says how they lie), of a layer
or of one expert's among many. A thread
takes four neighbouring columns of a row of words, 16 bytes, and multiplies every code in them by
every row of x in float32: a code under the exponent of 2**23 is a float, from which the zero is
subtracted exactly. They are written in Triton's own words alone, so that they compile for GPUs of
any maker and run in the interpreter.
"""

# Triton compiles these functions: its loops and constants have no Python types.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dequantize", "multiply_rows", "sort_by_expert"]

# Numbers that vary from call to call are kept out of what Triton specialises code for.
VARYING = ["M", "STEPS", "PARTS", "GROUP_SHIFT"]


@triton.jit(do_not_specialize=VARYING)
def multiply_rows(  # noqa: C901, PLR0912, PLR0913, PLR0917, ANN201 - a kernel and its arguments
    x,  # noqa: ANN001 - float16 or bfloat16 [M, K], two of them in an int32
    words,  # noqa: ANN001 - int32 [padded K / UNIT, PLANES, 8, S]
    table,  # noqa: ANN001 - int32 [G, S], a scale's bits and a zero; [G, 2, S] for float32 scales
    bias,  # noqa: ANN001 - float32 [N]; not read unless BIAS
    y,  # noqa: ANN001 - [M, N], or where PARTS > 1, float32 [PARTS, M, N]
    experts,  # noqa: ANN001 - int64, the expert of each tile's rows, -1 for none; where EXPERTS
    order,  # noqa: ANN001 - int32, which rows of y those are, M for none; where EXPERTS, SORTED
    M,  # noqa: ANN001, N803 - rows of y
    N,  # noqa: ANN001, N803 - columns of the weight
    K,  # noqa: ANN001, N803 - rows of the weight
    S,  # noqa: ANN001, N803 - columns of the tables, those of joined layers too
    STEPS,  # noqa: ANN001, N803 - padded K / BLOCK_K
    PARTS,  # noqa: ANN001, N803 - programs that share a tile's rows of the weight
    GROUP_SHIFT,  # noqa: ANN001, N803 - a group of the tables has 2**GROUP_SHIFT rows
    WORDS,  # noqa: ANN001, N803 - from the words of an expert to those of the next
    TABLE,  # noqa: ANN001, N803 - the same for their tables
    SHARED,  # noqa: ANN001, N803 - rows of y that are of one row of x
    BITS: tl.constexpr,  # noqa: N803
    BLOCK_M: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    BLOCK_K: tl.constexpr,  # noqa: N803 - a unit or several
    SPAN: tl.constexpr,  # noqa: N803 - rows of a step that surely share a group
    DTYPE: tl.constexpr,  # noqa: N803 - of x
    SCALES: tl.constexpr,  # noqa: N803 - the scales' dtype; float32 makes a table twice as large
    EVEN: tl.constexpr,  # noqa: N803 - whether blocks cover K and S with nothing over
    BIAS: tl.constexpr,  # noqa: N803
    EXPERTS: tl.constexpr,  # noqa: N803 - whether rows are of different weights
    SORTED: tl.constexpr,  # noqa: N803 - whether a tile's rows stand apart in y
):
    """Compute one tile [BLOCK_M, BLOCK_N] of y, or of one part of it."""
    UNIT: tl.constexpr = 256 if BITS == 3 else 256 // BITS  # noqa: N806
    ROWS: tl.constexpr = 24 if BITS == 3 else 8  # noqa: N806 - rows of words in a unit
    # Rows of a unit that share a group. In Triton 3.5, torch 2.9's, a min is no constant.
    DEPTH: tl.constexpr = SPAN if SPAN < UNIT else UNIT  # noqa: N806, FURB136
    # Many rows share the work of a scaled weight, and leave no registers for a second sum.
    SCALED: tl.constexpr = BLOCK_M >= 4  # noqa: N806
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    if EXPERTS:
        expert = tl.load(experts + tl.program_id(0))
        STEPS = tl.where(expert < 0, 0, STEPS)  # noqa: N806
        expert = tl.maximum(expert, 0)
        words += expert * WORDS
        table += expert * TABLE
        if SORTED:
            rows = tl.load(order + rows)
    # In the words' own shape, so that scales are loaded where the weights are decoded.
    column = tl.broadcast_to(columns[None, None, :], 1, 8, BLOCK_N)
    pair = tl.arange(0, 8)[None, :, None]
    words_at = words + pair * S + column
    read = tl.minimum(rows, M - 1)  # rows beyond the last are the last's, not stored
    if EXPERTS:
        read = read // SHARED
    x_at = x + read.to(tl.int64)[:, None, None] * (K // 2) + pair
    total = tl.zeros((BLOCK_M, 8, BLOCK_N), dtype=tl.float32)
    for step in tl.range(part, STEPS, PARTS):
        for piece in tl.static_range(BLOCK_K // UNIT):
            unit = step * (BLOCK_K // UNIT) + piece
            first, second, third = _load(words_at + unit * (ROWS * S), S, column, EVEN, BITS)
            for span in tl.static_range(UNIT // DEPTH):
                if (piece * UNIT + span * DEPTH) % SPAN == 0:
                    group = (unit * UNIT + span * DEPTH) >> GROUP_SHIFT
                    scale, zero = _group(table, group, S, column, EVEN, SCALES)
                partial = total
                if not SCALED:
                    partial = tl.zeros((BLOCK_M, 8, BLOCK_N), dtype=tl.float32)
                for place in tl.static_range(DEPTH // 16):
                    low, high = _weights(
                        first, second, third, zero, span * (DEPTH // 16) + place, BITS
                    )
                    if SCALED:
                        low, high = low * scale, high * scale
                    row = unit * (UNIT // 2) + (span * (DEPTH // 16) + place) * 8
                    if EVEN:
                        values = tl.load(x_at + row)
                    else:
                        values = tl.load(x_at + row, mask=pair < K // 2 - row, other=0)
                    partial += _value(values, 0, DTYPE) * low
                    partial += _value(values, 1, DTYPE) * high
                total = partial if SCALED else total + partial * scale
    sums = tl.sum(total, axis=1)
    inside = columns < N
    if BIAS:
        sums += tl.load(bias + columns, mask=inside, other=0)[None, :]
    at = (part.to(tl.int64) * M + rows)[:, None] * N + columns[None, :]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=inside[None, :] & (rows < M)[:, None])


@triton.jit(do_not_specialize=["P"])
def sort_by_expert(  # noqa: ANN201 - a kernel's arguments
    experts,  # noqa: ANN001 - int64 [P], of each row
    order,  # noqa: ANN001 - int32 [tiles * BLOCK_M]
    of_tiles,  # noqa: ANN001 - int64 [tiles]
    P,  # noqa: ANN001, N803 - rows
    BLOCK_P: tl.constexpr,  # noqa: N803 - a power of two, P or more
    BLOCK_E: tl.constexpr,  # noqa: N803 - a power of two, more than the experts
    BLOCK_M: tl.constexpr,  # noqa: N803 - rows of a tile
):
    """List one expert's rows in tiles of its own, behind those of the experts before it."""
    expert = tl.program_id(0)
    rows = tl.arange(0, BLOCK_P)
    own = tl.load(experts + rows, mask=rows < P, other=BLOCK_E - 1).to(tl.int32)
    counts = tl.histogram(own, BLOCK_E)
    every = tl.arange(0, BLOCK_E)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(every < expert, tiles, 0))
    count = tl.sum(tl.where(every == expert, counts, 0))
    chosen = own == expert
    place = tl.cumsum(chosen.to(tl.int32)) - 1
    tl.store(order + first * BLOCK_M + place, rows, mask=chosen)
    beyond = count + tl.arange(0, BLOCK_M)
    last = (count + BLOCK_M - 1) // BLOCK_M
    tl.store(order + first * BLOCK_M + beyond, P, mask=beyond < last * BLOCK_M)
    tl.store(of_tiles + first + rows, expert.to(tl.int64), mask=rows < last)


@triton.jit(do_not_specialize=["GROUP_SHIFT"])
def dequantize(  # noqa: ANN201 - a kernel's arguments
    words,  # noqa: ANN001 - int32 [padded K / UNIT, PLANES, 8, S]
    table,  # noqa: ANN001 - int32 [G, S] or [G, 2, S]
    weight,  # noqa: ANN001 - float16 or bfloat16 [K, N]
    K,  # noqa: ANN001, N803 - rows of the weight
    N,  # noqa: ANN001, N803 - its columns, padded to a multiple of 32
    S,  # noqa: ANN001, N803 - columns of the tables, those of joined layers too
    GROUP_SHIFT,  # noqa: ANN001, N803
    BITS: tl.constexpr,  # noqa: N803
    BLOCK_N: tl.constexpr,  # noqa: N803
    SPAN: tl.constexpr,  # noqa: N803 - rows of a unit that surely share a group
    SCALES: tl.constexpr,  # noqa: N803
):
    """Write one unit of rows and BLOCK_N columns of the weight, rounded once."""
    UNIT: tl.constexpr = 256 if BITS == 3 else 256 // BITS  # noqa: N806
    ROWS: tl.constexpr = 24 if BITS == 3 else 8  # noqa: N806
    unit = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.broadcast_to(column[None, None, :], 1, 8, BLOCK_N)
    pair = tl.arange(0, 8)[None, :, None]
    at = words + unit.to(tl.int64) * (ROWS * S) + pair * S + column
    first, second, third = _load(at, S, column, EVEN=False, BITS=BITS)
    for span in tl.static_range(UNIT // SPAN):
        row = unit * UNIT + span * SPAN
        scale, zero = _group(table, row >> GROUP_SHIFT, S, column, EVEN=False, SCALES=SCALES)
        for place in tl.static_range(SPAN // 16):
            low, high = _weights(first, second, third, zero, span * (SPAN // 16) + place, BITS)
            even = row + place * 16 + pair * 2
            to = weight + even.to(tl.int64) * N + column
            inside = (column < N) & (even < K)
            tl.store(to, (low * scale).to(weight.dtype.element_ty), mask=inside)
            tl.store(to + N, (high * scale).to(weight.dtype.element_ty), mask=inside)


@triton.jit
def _load(at, S, column, EVEN: tl.constexpr, BITS: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Load a unit's words, int32 [1, 8, BLOCK_N]: at 3 bits three planes, else one."""
    first = _word(at, S, column, EVEN)
    second = first
    third = first
    if BITS == 3:
        second = _word(at + 8 * S, S, column, EVEN)
        third = _word(at + 16 * S, S, column, EVEN)
    return first, second, third


@triton.jit
def _word(at, S, column, EVEN: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Load a word of each column."""
    return tl.load(at) if EVEN else tl.load(at, mask=column < S, other=0)


@triton.jit
def _group(  # noqa: ANN202
    table,  # noqa: ANN001
    group,  # noqa: ANN001
    S,  # noqa: ANN001, N803
    column,  # noqa: ANN001
    EVEN: tl.constexpr,  # noqa: N803
    SCALES: tl.constexpr,  # noqa: N803
):
    """Load the scale and the zero of a group: float32 [1, 8, BLOCK_N]."""
    if tl.float32 == SCALES:
        at = table + group * 2 * S + column
        zero = _word(at + S, S, column, EVEN)
        scale = _word(at, S, column, EVEN).to(tl.float32, bitcast=True)
    else:
        both = _word(table + group * S + column, S, column, EVEN)
        zero = both >> 16
        scale = both.to(tl.int16).to(SCALES, bitcast=True).to(tl.float32)
    return scale, zero.to(tl.float32)


@triton.jit
def _weights(  # noqa: ANN202
    first,  # noqa: ANN001
    second,  # noqa: ANN001
    third,  # noqa: ANN001
    zero,  # noqa: ANN001
    BLOCK: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
):
    """Decode one block's even and odd rows, the zeros subtracted: float32 [1, 8, BLOCK_N]."""
    if BITS == 3 and BLOCK == 15:
        words = (first >> 15) & 0x00010001
        words |= (second >> 14) & 0x00020002
        words |= (third >> 13) & 0x00040004
    elif BITS == 3:
        words = first if BLOCK < 5 else second if BLOCK < 10 else third
    else:
        words = first
    at: tl.constexpr = (BLOCK % 15 % 5 if BITS == 3 else BLOCK) * BITS
    # Where the code lies in a word, it is a float's last bits: 2**(23 - at) + code, all exact.
    MASK: tl.constexpr = ((1 << BITS) - 1) << at  # noqa: N806
    EXPONENT: tl.constexpr = (127 + 23 - at) << 23  # noqa: N806
    taken = zero + 1.0 * (1 << (23 - at))
    low = ((words & MASK) | EXPONENT).to(tl.float32, bitcast=True) - taken
    high = (((words >> 16) & MASK) | EXPONENT).to(tl.float32, bitcast=True) - taken
    return low, high


@triton.jit
def _value(pair, half: tl.constexpr, DTYPE: tl.constexpr):  # noqa: ANN001, ANN202, N803
    """Take one of two neighbouring 16-bit floats in a word as float32."""
    if tl.bfloat16 == DTYPE:
        bits = pair << 16 if half == 0 else pair & -65536
        value = bits.to(tl.float32, bitcast=True)
    else:
        value = (pair >> (16 * half)).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return value
