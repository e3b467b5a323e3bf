"""Launch the Triton kernels between products; imports triton. `operators.py` says what they do."""

from __future__ import annotations

from typing import Any

import torch

from gptq_loader_kernels.attention import elementwise
from gptq_loader_kernels.attention.tiles import COLUMNS, norm_warps, power_of_two
from gptq_loader_kernels.attention.torch_attention import CODE_LIMITS, required

__all__ = ["activation_and_mul", "add_rms_norm", "rms_norm", "rotary_and_cache", "write_cache"]

# torch rounds every product before a sum, which contraction would not.
EXACT = {"enable_fp_fusion": False}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, style: str) -> torch.Tensor:
    """Normalise the last dimension by its root mean square."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    _norm(rows, None, weight, None, out, None, eps, style)
    return out.view(x.shape)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    style: str,
    post_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x, normalised first where there is a `post_weight`, to the residual, and normalise."""
    rows = x.reshape(-1, x.shape[-1])
    out, total = (torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(2))
    _norm(rows, residual.reshape(rows.shape), weight, post_weight, out, total, eps, style)
    return out.view(x.shape), total.view(x.shape)


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    post_weight: torch.Tensor | None,
    out: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
    style: str,
) -> None:
    rows, size = x.shape
    if rows == 0:
        return
    kernel: Any = elementwise.norm
    with torch.cuda.device_of(x):
        kernel[(rows,)](
            x,
            residual,
            weight,
            post_weight,
            out,
            total,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            size,
            eps,
            STYLE=style,
            ADDS=residual is not None,
            POST=post_weight is not None,
            BLOCK=power_of_two(size),
            num_warps=norm_warps(size),
            **EXACT,
        )


def write_cache(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Write keys [T, kv_heads, D] and values [T, kv_heads, Dv] to their slots, int64 [T]."""
    _write(
        None, keys, values, None, None, key_cache, value_cache, slots,
        key_scales, value_scales, None, INTERLEAVED=False, STYLE="",
    )  # fmt: skip


def rotary_and_cache(  # noqa: PLR0913, PLR0917 - an operator's arguments
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    interleaved: bool,  # noqa: FBT001 - an operator's argument
    query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None,
    eps: float,
    style: str,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> torch.Tensor:
    """Rotate query and keys, and write keys and values to the cache."""
    out = query.new_empty(query.shape)
    if sin.stride() != cos.stride():
        sin, cos = sin.contiguous(), cos.contiguous()
    _write(
        query, keys, values, cos, sin, key_cache, value_cache, slots, key_scales, value_scales,
        out, query_weight=query_weight, key_weight=key_weight, eps=eps,
        INTERLEAVED=interleaved, STYLE=style,
    )  # fmt: skip
    return out


def _write(  # noqa: PLR0913 - what the kernel takes
    query: torch.Tensor | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    out: torch.Tensor | None,
    *,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    **constants: Any,  # noqa: ANN401
) -> None:
    tokens, kv_heads, dim = keys.shape
    if tokens == 0:
        return
    eight = key_cache.dtype in CODE_LIMITS
    if eight:
        key_scales, value_scales = required(key_scales), required(value_scales)
    heads = 0 if query is None else query.shape[1]
    kernel: Any = elementwise.rotary_and_cache
    with torch.cuda.device_of(keys):
        kernel[(tokens, heads + 2 * kv_heads)](
            query,
            keys,
            values,
            cos,
            sin,
            query_weight,
            key_weight,
            key_cache,
            value_cache,
            key_scales,
            value_scales,
            slots,
            out,
            *((0, 0) if query is None else query.stride()[:2]),
            *keys.stride()[:2],
            *values.stride()[:2],
            *((0, 0) if cos is None else cos.stride()),
            *key_cache.stride()[:3],
            *value_cache.stride()[:3],
            *((0, 0) if key_scales is None else key_scales.stride()[:2]),
            slots.stride(0),
            eps,
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=dim,
            DV=values.shape[2],
            R=0 if cos is None else cos.shape[1],
            D_PAD=power_of_two(dim),
            DV_PAD=power_of_two(values.shape[2]),
            BLOCK_SIZE=key_cache.shape[1],
            ROTATES=query is not None,
            QUERY_NORM=query_weight is not None,
            KEY_NORM=key_weight is not None,
            LIMIT=CODE_LIMITS.get(key_cache.dtype, 0.0),
            WHOLE_CODES=key_cache.dtype == torch.int8,
            num_warps=1,
            **constants,
            **EXACT,
        )


def activation_and_mul(joined: torch.Tensor, activation: str) -> torch.Tensor:
    """Multiply the activated first half of the last dimension by the second half."""
    rows = joined.reshape(-1, joined.shape[-1])
    size = rows.shape[1] // 2
    out = rows.new_empty(rows.shape[0], size)
    if rows.shape[0]:
        kernel: Any = elementwise.activation_and_mul
        with torch.cuda.device_of(joined):
            kernel[(rows.shape[0], -(-size // COLUMNS))](
                rows,
                out,
                rows.stride(0),
                size,
                SILU=activation == "silu",
                BLOCK=COLUMNS,
                **EXACT,
            )
    return out.view(*joined.shape[:-1], size)
