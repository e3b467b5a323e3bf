"""The Triton kernels between the products of a decode step. Imports triton.

Their arithmetic is that of transformers' modules, with its roundings: they are
launched without contraction of products and sums.
"""

# Triton compiles these functions: its loops and constants have no Python types.
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0913, PLR0917

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activation_and_mul", "norm", "rotary_and_cache"]

SMALLEST_SCALE = tl.constexpr(2.0**-14)  # that `torch_attention.quantize` uses
LARGEST_FLOAT16 = tl.constexpr(65504.0)


@triton.jit
def norm(
    x,  # [T, D]
    residual,  # [T, D]; not read unless ADDS
    weight,  # [D]
    post_weight,  # [D]; not read unless POST
    out,  # [T, D]
    total,  # [T, D]; not written unless ADDS
    x_stride,
    residual_stride,
    D,
    eps,
    STYLE: tl.constexpr,
    ADDS: tl.constexpr,
    POST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise a row; before that, add it to the residual, normalised itself where POST."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    value = tl.load(x + row * x_stride + column, mask=inside, other=0)
    if POST:
        value = _weighted(
            value, _scale_of(value, D, eps), tl.load(post_weight + column, mask=inside, other=0),
            STYLE,
        )  # fmt: skip
    if ADDS:
        old = tl.load(residual + row * residual_stride + column, mask=inside, other=0)
        value = (old.to(tl.float32) + value.to(tl.float32)).to(old.dtype)
        tl.store(total + row * D + column, value, mask=inside)
    value = _weighted(
        value, _scale_of(value, D, eps), tl.load(weight + column, mask=inside, other=0), STYLE
    )
    tl.store(out + row * D + column, value, mask=inside)


@triton.jit
def rotary_and_cache(
    query,  # [T, heads, D]; not read unless ROTATES
    keys,  # [T, kv_heads, D]
    values,  # [T, kv_heads, DV]
    cos,  # [T, R]
    sin,
    query_weight,  # [D]; not read unless QUERY_NORM
    key_weight,
    key_cache,  # [blocks, BLOCK_SIZE, kv_heads, D]
    value_cache,
    key_scales,  # [blocks, BLOCK_SIZE, kv_heads], of caches in 8 bits
    value_scales,
    slots,  # int64 [T]
    out,  # [T, heads, D]
    query_stride,  # of a token
    query_head,
    keys_stride,
    keys_head,
    values_stride,
    values_head,
    cos_stride,
    cos_column,
    key_block,
    key_slot,
    key_head,
    value_block,
    value_slot,
    value_head,
    scale_block,
    scale_slot,
    slots_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    R: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROTATES: tl.constexpr,  # no query and no rotation where it is not so: keys are written alone
    INTERLEAVED: tl.constexpr,
    QUERY_NORM: tl.constexpr,
    KEY_NORM: tl.constexpr,
    STYLE: tl.constexpr,
    LIMIT: tl.constexpr,  # the largest code of a cache in 8 bits, 0 for others
    WHOLE_CODES: tl.constexpr,  # whether codes are integers
):
    """Rotate a head of a token's query, or rotate and write one of its keys or values."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, D_PAD)
    if ROTATES:
        if head < HEADS:
            turned = _rotated(
                query + token * query_stride + head * query_head, query_weight,
                cos + token * cos_stride, sin + token * cos_stride, cos_column, eps,
                D, D_PAD, R, INTERLEAVED, QUERY_NORM, STYLE,
            )  # fmt: skip
            tl.store(out + (token * HEADS + head) * D + column, turned, mask=column < D)
            return
        head -= HEADS
    slot = tl.load(slots + token * slots_stride)
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    scale_at = 0
    if LIMIT > 0:
        scale_at = block * scale_block + offset * scale_slot + head % KV_HEADS
    if head < KV_HEADS:
        key_at = keys + token * keys_stride + head * keys_head
        if ROTATES:
            key = _rotated(
                key_at, key_weight, cos + token * cos_stride, sin + token * cos_stride,
                cos_column, eps, D, D_PAD, R, INTERLEAVED, KEY_NORM, STYLE,
            )  # fmt: skip
        else:
            key = tl.load(key_at + column, mask=column < D, other=0)
        place = key_cache + block * key_block + offset * key_slot + head * key_head
        _write(key, place, key_scales, scale_at, D, D_PAD, LIMIT, WHOLE_CODES)
    else:
        columns = tl.arange(0, DV_PAD)
        value_at = values + token * values_stride + (head - KV_HEADS) * values_head
        new = tl.load(value_at + columns, mask=columns < DV, other=0)
        target = value_cache + block * value_block + offset * value_slot
        target += (head - KV_HEADS) * value_head
        _write(new, target, value_scales, scale_at, DV, DV_PAD, LIMIT, WHOLE_CODES)


@triton.jit
def activation_and_mul(
    joined,  # [T, 2 * I]
    out,  # [T, I]
    joined_stride,
    I,  # noqa: E741
    SILU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply the activated first half of a row by the second."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < I
    at = joined + row * joined_stride + column
    gate = tl.load(at, mask=inside, other=0)
    x = gate.to(tl.float32)
    inner = x
    if not SILU:  # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x**3)
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    activated = (x / (1 + tl.exp(-inner))).to(gate.dtype).to(tl.float32)
    up = tl.load(at + I, mask=inside, other=0).to(tl.float32)
    tl.store(out + row * I + column, (activated * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scale_of(value, D, eps):
    """Find what a row is multiplied by: one over the root of its mean square."""
    value = value.to(tl.float32)
    return 1 / tl.sqrt(tl.sum(value * value, axis=0) / D + eps)


@triton.jit
def _weighted(value, scale, weight, STYLE: tl.constexpr):
    """Scale a row and multiply it by the weight, rounding as the style says."""
    normed = value.to(tl.float32) * scale
    if STYLE == "gemma":
        result = normed * (1 + weight.to(tl.float32))
    elif STYLE == "gpt_oss":
        result = weight.to(tl.float32) * normed
    else:
        result = weight.to(tl.float32) * normed.to(value.dtype).to(tl.float32)
    return result.to(value.dtype)


@triton.jit
def _rotated(
    at,
    weight,
    cos,
    sin,
    cos_column,
    eps,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    STYLE: tl.constexpr,
):
    """Load a head, normalise it where NORM, and rotate its first 2 * R numbers."""
    column = tl.arange(0, D_PAD)
    turned = column < 2 * R
    if INTERLEAVED:
        other, place, first = column ^ 1, column // 2, column % 2 == 0
    else:
        first = column < R
        other, place = tl.where(first, column + R, column - R), column % R
    other = tl.where(turned, other, 0)
    x = tl.load(at + column, mask=column < D, other=0)
    y = tl.load(at + other)
    if NORM:
        scale = _scale_of(x, D, eps)
        x = _weighted(x, scale, tl.load(weight + column, mask=column < D, other=0), STYLE)
        y = _weighted(y, scale, tl.load(weight + other), STYLE)
    c = tl.load(cos + place * cos_column, mask=turned, other=0)
    s = tl.load(sin + place * cos_column, mask=turned, other=0)
    straight = x.to(tl.float32) * c.to(tl.float32)
    across = y.to(tl.float32) * s.to(tl.float32)
    if c.dtype == x.dtype:  # each product is rounded, as torch's are
        straight = straight.to(x.dtype).to(tl.float32)
        across = across.to(x.dtype).to(tl.float32)
    rotated = tl.where(first, straight - across, straight + across)
    return tl.where(turned, rotated.to(x.dtype), x)


@triton.jit
def _write(
    value,
    place,
    scales,
    scale_at,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    LIMIT: tl.constexpr,
    WHOLE_CODES: tl.constexpr,
):
    """Write a head to the cache, in 8 bits with its scale where LIMIT."""
    column = tl.arange(0, D_PAD)
    if LIMIT > 0:
        value = value.to(tl.float32)
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(value), axis=0), LIMIT), SMALLEST_SCALE)
        if scales.dtype.element_ty == tl.float16:
            scale = tl.minimum(scale, LARGEST_FLOAT16)
        scale = scale.to(scales.dtype.element_ty)
        tl.store(scales + scale_at, scale)
        value = tl.div_rn(value, tl.zeros_like(value) + scale.to(tl.float32))
        if WHOLE_CODES:  # to the nearest, ties to even: what a float32 of this size has no room for
            value = (value + 12582912.0) - 12582912.0
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
    tl.store(place + column, value.to(place.dtype.element_ty), mask=column < D)
