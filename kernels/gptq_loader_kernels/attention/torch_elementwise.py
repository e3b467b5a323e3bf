"""Norms, rotary embeddings and gated activations in plain torch operations, on any device.

The arithmetic and its roundings are those of transformers' modules, in their order.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from gptq_loader_kernels.attention.torch_attention import write_cache

__all__ = [
    "activation_and_mul",
    "add_rms_norm",
    "rms_norm",
    "rotary_and_cache",
    "rotate",
    "write_cache",
]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, style: str) -> torch.Tensor:
    """Normalise the last dimension by its root mean square; see `operators.py`."""
    normed = x.to(torch.float32)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    if style == "gemma":
        return (normed * (1.0 + weight.float())).to(x.dtype)
    if style == "gpt_oss":
        return (weight * normed).to(x.dtype)
    return (weight * normed.to(x.dtype)).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    style: str,
    post_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x, normalised first where there is a `post_weight`, to the residual, and normalise."""
    if post_weight is not None:
        x = rms_norm(x, post_weight, eps, style)
    total = residual + x
    return rms_norm(total, weight, eps, style), total


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
    """Rotate query and keys, and write keys and values to the cache; see `operators.py`."""
    if query_weight is not None:
        query = rms_norm(query, query_weight, eps, style)
    if key_weight is not None:
        keys = rms_norm(keys, key_weight, eps, style)
    query = rotate(query, cos, sin, interleaved=interleaved)
    keys = rotate(keys, cos, sin, interleaved=interleaved)
    write_cache(keys, values, key_cache, value_cache, slots, key_scales, value_scales)
    return query.contiguous()


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool
) -> torch.Tensor:
    """Rotate the first 2 * R of the last dimension of x [T, heads, D] by cos, sin [T, R]."""
    size = 2 * cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    rotated = x[..., :size]
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = rotated.chunk(2, dim=-1)
    pair = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((joined.to(x.dtype), x[..., size:]), dim=-1)


def activation_and_mul(joined: torch.Tensor, activation: str) -> torch.Tensor:
    """Multiply the activated first half of the last dimension by the second half."""
    gate, up = joined.chunk(2, dim=-1)
    if activation == "silu":
        return functional.silu(gate) * up
    return functional.gelu(gate, approximate="tanh") * up
