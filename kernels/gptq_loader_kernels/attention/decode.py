"""The Triton kernels of attention: one token of each sequence over its blocks. Imports triton.

A program takes a chunk of a sequence's positions, and the query heads of a head of keys, so that
keys and values are read once. `attend_by_cores` multiplies by tensor cores. `attend_by_lanes` is
for GPUs without them, float32, and one query head a head of keys: each place of a step keeps a
softmax of its own, so that threads meet once, after the last step. `combine` adds chunks up in
their order. Scores are powers of two all along.
"""

# Triton compiles these functions: its loops and constants have no Python types.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# Tests of constants stand alone, so that the rest is not compiled.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806, PLR0913, PLR0915, PLR0917, SIM102

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend_by_cores", "attend_by_lanes", "combine"]

LOWEST = tl.constexpr(-1e30)  # below every score, and finite: -inf less -inf is not a number
LOG2_E = tl.constexpr(1.4426950408889634)
SMALLEST = tl.constexpr(1e-30)
PARTS = tl.constexpr(16)  # that are added at once

# Numbers that vary from call to call are kept out of what Triton specialises code for.
VARYING = ["scale", "window", "softcap", "table_stride"]


@triton.jit(do_not_specialize=VARYING)
def attend_by_cores(
    query,  # float16 or bfloat16 [S, heads, D]
    key_cache,  # the same, or 8 bits [blocks, BLOCK_SIZE, kv_heads, D]
    value_cache,  # [blocks, BLOCK_SIZE, kv_heads, DV]
    key_scales,  # [blocks, BLOCK_SIZE, kv_heads], of 8 bits
    value_scales,
    tables,  # int32 [S, table_stride]
    lengths,  # int32 [S]
    sinks,  # [heads]; not read unless SINKS
    parts,  # float32 [S, heads, SPLITS, DV]; not written where SPLITS is 1
    stats,  # float32 [S, heads, SPLITS, 2], the highest score and the sum of weights
    out,  # [S, heads, DV]; written where SPLITS is 1
    scale,
    window,
    softcap,
    table_stride,
    query_stride,  # of a sequence
    query_head,
    key_block,
    key_slot,
    key_head,
    value_block,
    value_slot,
    value_head,
    scale_block,
    scale_slot,
    GROUP: tl.constexpr,  # query heads of a head of keys
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    EIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PACKED: tl.constexpr,  # whether four codes of int8 become float16 at once, by NVIDIA's code
):
    """Attend to one chunk, a matrix product of ROWS query heads and POSITIONS at a time."""
    split, sequence = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head, in_group, heads = _heads(GROUP, ROWS)
    length = tl.load(lengths + sequence)
    start, base, size = _chunk(length, window, SPLITS, CHUNK, POSITIONS)
    low = base + split * size
    high = tl.minimum(low + size, length)
    if SPLITS > 1:
        if low >= high:
            return
    d, dv = tl.arange(0, D_PAD)[None, :], tl.arange(0, DV_PAD)[None, :]
    at = query + sequence * query_stride + heads[:, None] * query_head + d
    q = tl.load(at, mask=_columns(in_group[:, None], d, D, D_PAD), other=0.0)
    q_scale = tl.full((ROWS,), 1.0, tl.float32)
    if EIGHT:  # multiplied in float16, which holds every code, bfloat16's numbers after scaling
        q = q.to(tl.float32)
        q_scale = tl.maximum(tl.max(tl.abs(q), axis=1), SMALLEST)
        q = (q / q_scale[:, None]).to(tl.float16)
    highest = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DV_PAD), tl.float32)
    if SINKS:
        if split == 0:
            highest = tl.load(sinks + heads, mask=in_group, other=0).to(tl.float32) * LOG2_E
            total += 1
    keys_at, values_at = key_cache + head * key_head + d, value_cache + head * value_head + dv
    for step in tl.range(low // POSITIONS, tl.cdiv(high, POSITIONS), num_stages=STAGES):
        position = step * POSITIONS + tl.arange(0, POSITIONS)
        inside = (position >= start) & (position < high)
        block = _blocks(
            tables + sequence * table_stride, position, inside, step, BLOCK_SIZE, POSITIONS
        )
        slot = position % BLOCK_SIZE
        place = (block * key_block + slot * key_slot)[:, None]
        k = tl.load(keys_at + place, mask=_columns(inside[:, None], d, D, D_PAD), other=0.0)
        if EIGHT:
            k = _codes(k, PACKED)
        scores = _dot(q, tl.trans(k), INTERPRETED)
        scales_at = block * scale_block + slot * scale_slot + head
        if EIGHT:
            factors = tl.load(key_scales + scales_at, mask=inside, other=0.0).to(tl.float32)
            scores *= q_scale[:, None] * factors[None, :]
        scores = _capped(scores, scale, softcap, SOFTCAP)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        above = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - above[:, None])
        shrink = tl.exp2(highest - above)
        total = total * shrink + tl.sum(weights, axis=1)
        place = (block * value_block + slot * value_slot)[:, None]
        v = tl.load(values_at + place, mask=_columns(inside[:, None], dv, DV, DV_PAD), other=0.0)
        if EIGHT:  # relative to the largest scale, lest the weights fall below float16's numbers
            factors = tl.load(value_scales + scales_at, mask=inside, other=0.0).to(tl.float32)
            largest = tl.max(factors, axis=0)
            weights *= (factors / largest)[None, :]
            added = _dot(weights.to(tl.float16), _codes(v, PACKED), INTERPRETED) * largest
        else:
            added = _dot(weights.to(q.dtype), v, INTERPRETED)
        sums = sums * shrink[:, None] + added
        highest = above
    _write(
        parts, stats, out, sequence, split, heads, in_group, dv, highest, total, sums,
        tl.num_programs(1) // tl.cdiv(GROUP, ROWS) * GROUP, DV, DV_PAD, SPLITS,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def attend_by_lanes(
    query,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    tables,
    lengths,
    sinks,
    parts,
    stats,
    out,
    scale,
    window,
    softcap,
    table_stride,
    query_stride,
    query_head,
    key_block,
    key_slot,
    key_head,
    value_block,
    value_slot,
    value_head,
    scale_block,
    scale_slot,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
    EIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    INTERPRETED: tl.constexpr,  # noqa: ARG001 - both kernels take the same arguments
    PACKED: tl.constexpr,
):
    """Attend to one chunk as `attend_by_cores` does, in float32 and without tensor cores."""
    split, sequence = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head, in_group, heads = _heads(GROUP, ROWS)
    length = tl.load(lengths + sequence)
    start, base, size = _chunk(length, window, SPLITS, CHUNK, POSITIONS)
    low = base + split * size
    high = tl.minimum(low + size, length)
    if SPLITS > 1:
        if low >= high:
            return
    d, dv = tl.arange(0, D_PAD)[None, None, :], tl.arange(0, DV_PAD)[None, None, :]
    at = query + sequence * query_stride + heads[:, None, None] * query_head + d
    q = tl.load(at, mask=_columns(in_group[:, None, None], d, D, D_PAD), other=0.0).to(tl.float32)
    highest = tl.full((ROWS, POSITIONS), LOWEST, tl.float32)
    total = tl.zeros((ROWS, POSITIONS), tl.float32)
    sums = tl.zeros((ROWS, POSITIONS, DV_PAD), tl.float32)
    keys_at, values_at = key_cache + head * key_head + d, value_cache + head * value_head + dv
    for step in tl.range(low // POSITIONS, tl.cdiv(high, POSITIONS), num_stages=STAGES):
        position = step * POSITIONS + tl.arange(0, POSITIONS)
        inside = (position >= start) & (position < high)
        block = _blocks(
            tables + sequence * table_stride, position, inside, step, BLOCK_SIZE, POSITIONS
        )
        slot = position % BLOCK_SIZE
        mask = inside[None, :, None]
        place = (block * key_block + slot * key_slot)[None, :, None]
        k = tl.load(keys_at + place, mask=_columns(mask, d, D, D_PAD), other=0.0)
        place = (block * value_block + slot * value_slot)[None, :, None]
        v = tl.load(values_at + place, mask=_columns(mask, dv, DV, DV_PAD), other=0.0)
        if EIGHT:
            k, v = _codes(k, PACKED), _codes(v, PACKED)
        scores = tl.sum(q * k.to(tl.float32), axis=2)
        scales_at = block * scale_block + slot * scale_slot + head
        if EIGHT:
            scores *= tl.load(key_scales + scales_at, mask=inside, other=0.0).to(tl.float32)[
                None, :
            ]
        scores = _capped(scores, scale, softcap, SOFTCAP)
        scores = tl.where(inside[None, :], scores, float("-inf"))
        above = tl.maximum(highest, scores)
        weights = tl.exp2(scores - above)
        shrink = tl.exp2(highest - above)
        total = total * shrink + weights
        if EIGHT:
            factors = tl.load(value_scales + scales_at, mask=inside, other=0.0).to(tl.float32)
            weights *= factors[None, :]
        sums = sums * shrink[:, :, None] + weights[:, :, None] * v.to(tl.float32)
        highest = above
    sink = tl.full((ROWS,), LOWEST, tl.float32)
    if SINKS:
        if split == 0:
            sink = tl.load(sinks + heads, mask=in_group, other=0).to(tl.float32) * LOG2_E
    above = tl.maximum(tl.max(highest, axis=1), sink)
    shrink = tl.exp2(highest - above[:, None])
    whole = tl.sum(total * shrink, axis=1)
    if SINKS:
        whole += tl.exp2(sink - above)
    _write(
        parts, stats, out, sequence, split, heads, in_group, tl.arange(0, DV_PAD)[None, :],
        above, whole, tl.sum(sums * shrink[:, :, None], axis=1),
        tl.num_programs(1) // tl.cdiv(GROUP, ROWS) * GROUP, DV, DV_PAD, SPLITS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["window"])
def combine(
    parts,  # float32 [S, heads, SPLITS, DV]
    stats,  # float32 [S, heads, SPLITS, 2]
    out,  # [S, heads, DV]
    lengths,  # int32 [S]
    window,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Add the chunks of a head up, in the same order whatever else is in the batch."""
    sequence = tl.program_id(0).to(tl.int64)
    row = sequence * tl.num_programs(1) + tl.program_id(1)
    length = tl.load(lengths + sequence)
    _, base, size = _chunk(length, window, SPLITS, CHUNK, POSITIONS)
    used = tl.cdiv(length - base, size)
    every = tl.arange(0, MAX_SPLITS)
    at = stats + row * (SPLITS * 2)
    highest = tl.max(tl.load(at + every * 2, mask=every < used, other=LOWEST), axis=0)
    dv = tl.arange(0, DV_PAD)[None, :]
    total = 0.0
    sums = tl.zeros((DV_PAD,), tl.float32)
    for first in range(0, used, PARTS):
        part = first + tl.arange(0, PARTS)
        factor = tl.exp2(tl.load(at + part * 2, mask=part < used, other=LOWEST) - highest)
        total += tl.sum(tl.load(at + part * 2 + 1, mask=part < used, other=0.0) * factor, axis=0)
        place = parts + (row * SPLITS + part[:, None]) * DV + dv
        some = tl.load(place, mask=_columns((part < used)[:, None], dv, DV, DV_PAD), other=0.0)
        sums += tl.sum(some * factor[:, None], axis=0)
    result = sums / tl.where(total == 0, 1.0, total)
    dv = tl.arange(0, DV_PAD)
    tl.store(out + row * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)


@triton.jit
def _heads(GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Say which head of keys a program reads, and which query heads it takes."""
    TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    head = tl.program_id(1) // TILES
    row = tl.program_id(1) % TILES * ROWS + tl.arange(0, ROWS)
    return head, row < GROUP, head * GROUP + row


@triton.jit
def _chunk(length, window, SPLITS: tl.constexpr, CHUNK: tl.constexpr, POSITIONS: tl.constexpr):
    """Say where the visible positions start, where their first step does, and a chunk's size."""
    start = tl.maximum(length - window, 0)
    base = start // POSITIONS * POSITIONS
    share = (length - base + SPLITS - 1) // SPLITS
    size = tl.maximum((share + POSITIONS - 1) // POSITIONS * POSITIONS, CHUNK)
    return start, base, size


@triton.jit
def _blocks(table, position, inside, step, BLOCK_SIZE: tl.constexpr, POSITIONS: tl.constexpr):
    """Load the block of each position; once where a step lies in one block."""
    if BLOCK_SIZE % POSITIONS == 0:
        block = tl.load(table + step * POSITIONS // BLOCK_SIZE) + tl.zeros_like(position)
    else:
        block = tl.load(table + position // BLOCK_SIZE, mask=inside, other=0)
    return block.to(tl.int64)


@triton.jit
def _columns(mask, column, SIZE: tl.constexpr, PADDED: tl.constexpr):
    """Add to a mask of rows that of columns, where some are padding."""
    if SIZE < PADDED:
        mask = mask & (column < SIZE)
    return mask


@triton.jit
def _codes(codes, PACKED: tl.constexpr):
    """Make float16 of codes in 8 bits."""
    if (
        PACKED and tl.int8 == codes.dtype
    ):  # 1024 + 128 + code, less 1152; Triton takes twice as long
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, a, b, c; mov.b32 c, 0x64806480; xor.b32 t, $2, 0x80808080;"
            " prmt.b32 a, t, 0x64646464, 0x4140; prmt.b32 b, t, 0x64646464, 0x4342;"
            " sub.rn.f16x2 $0, a, c; sub.rn.f16x2 $1, b, c; }",
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=False,  # or it is done after shared memory, whose codes no ldmatrix turns
            pack=4,
        )
    return codes.to(tl.float16)


@triton.jit
def _dot(a, b, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # which multiplies the bits of a bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def _capped(scores, scale, softcap, SOFTCAP: tl.constexpr):
    """Scale products of query and keys to powers of two."""
    if SOFTCAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        scores = 1 - 2 / (tl.exp2(scores * (scale * 2 * LOG2_E / softcap)) + 1)
        scores *= softcap * LOG2_E
    else:
        scores *= scale * LOG2_E
    return scores


@triton.jit
def _write(
    parts,
    stats,
    out,
    sequence,
    split,
    heads,
    in_group,
    dv,
    highest,
    total,
    sums,
    HEADS,
    DV: tl.constexpr,
    DV_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Write a chunk's sums, or the output where there is one chunk."""
    row = sequence * HEADS + heads
    mask = _columns(in_group[:, None], dv, DV, DV_PAD)
    if SPLITS == 1:
        sums = sums / tl.where(total == 0, 1.0, total)[:, None]
        tl.store(out + row[:, None] * DV + dv, sums.to(out.dtype.element_ty), mask=mask)
    else:
        part = row * SPLITS + split
        tl.store(parts + part[:, None] * DV + dv, sums, mask=mask)
        tl.store(stats + part * 2, highest, mask=in_group)
        tl.store(stats + part * 2 + 1, total, mask=in_group)
