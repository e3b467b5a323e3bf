"""The operations of a decode step as operators of torch; imports torch.

Every one chooses by the device of its first tensor: Triton's kernels or plain torch operations.
None waits for the device, and no size depends on a value, so that a graph captures them.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch

from gptq_loader_kernels.attention import torch_attention, torch_elementwise

if TYPE_CHECKING:
    from types import ModuleType

__all__ = [
    "Activation",
    "NormStyle",
    "activation_and_mul",
    "add_rms_norm",
    "paged_attention",
    "rms_norm",
    "rotary_and_cache",
    "write_cache",
]

Activation = Literal["silu", "gelu_pytorch_tanh"]
NormStyle = Literal["llama", "gemma", "gpt_oss"]

FLOAT8 = (8, 9)  # the first capability that converts it
CACHES = ("key_cache", "value_cache", "key_scales", "value_scales")


def write_cache(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Write the keys and values of tokens to their slots in the caches.

    Args:
        keys: [T, kv_heads, D].
        values: [T, kv_heads, Dv].
        key_cache: [blocks, block_size, kv_heads, D]; a floating dtype, int8 or float8_e4m3fn.
        value_cache: [blocks, block_size, kv_heads, Dv].
        slots: int64 [T], block * block_size + offset; a negative one is not written.
        key_scales: float16 or float32 [blocks, block_size, kv_heads], of a cache in 8 bits.
        value_scales: as key_scales.
    """
    _write_cache(keys, values, key_cache, value_cache, slots, key_scales, value_scales)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from one token of each sequence to all positions of its sequence.

    Args:
        query: [S, heads, D], heads a multiple of kv_heads.
        key_cache: [blocks, block_size, kv_heads, D].
        value_cache: [blocks, block_size, kv_heads, Dv].
        block_tables: int32 [S, max_blocks]; entries past a length, or all before its window, are
            not read.
        lengths: int32 [S], positions with the current token's; 0 for a row of padding.
        scale: multiplies the products of query and keys.
        window: how many positions are visible, the current one among them; None for all.
        softcap: bounds the scores by softcap * tanh(score / softcap).
        sinks: [heads], a score of no position, which takes its part of the softmax.
        key_scales: [blocks, block_size, kv_heads], of a cache in 8 bits.
        value_scales: as key_scales.

    Returns:
        [S, heads, Dv] in query's dtype; zeros for a row of padding.
    """
    attended: torch.Tensor = _paged_attention(
        query, key_cache, value_cache, block_tables, lengths,
        scale, window, softcap, sinks, key_scales, value_scales,
    )  # fmt: skip
    return attended


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, style: NormStyle = "llama"
) -> torch.Tensor:
    """Normalise the last dimension of x by its root mean square, in float32.

    Args:
        x: [..., D].
        weight: [D].
        eps: is added to the mean of squares.
        style: "llama" rounds to x's dtype before it multiplies by the weight, "gemma" multiplies
            by 1 + weight in float32 and rounds after, "gpt_oss" by the weight in float32.

    Returns:
        [..., D] in x's dtype.
    """
    normed: torch.Tensor = _rms_norm(x, weight, eps, style)
    return normed


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    style: NormStyle = "llama",
    post_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to the residual, and normalise the sum as `rms_norm` does.

    Args:
        x: [T, D].
        residual: [T, D].
        weight: [D].
        eps: of each norm.
        style: of each norm.
        post_weight: [D], of a norm of x before it is added (Gemma 2 and 3, GLM 4).

    Returns:
        The normalised sum and the sum, [T, D] each.
    """
    normed: torch.Tensor
    total: torch.Tensor
    normed, total = _add_rms_norm(x, residual, weight, eps, style, post_weight)
    return normed, total


def rotary_and_cache(  # noqa: PLR0913 - all that one kernel reads
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    interleaved: bool = False,
    query_weight: torch.Tensor | None = None,
    key_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    style: NormStyle = "llama",
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate query and keys by their positions, and write keys and values to their slots.

    Args:
        query: [T, heads, D]; like keys and values it may be a part of a joined product.
        keys: [T, kv_heads, D].
        values: [T, kv_heads, Dv].
        cos: [T, R], for the first 2 * R of a head's dimensions; half of transformers' table, which
            holds each number twice. In query's dtype every product is rounded, as in Llama; in
            float32 the sum alone is, as in Cohere.
        sin: as cos.
        key_cache: as in `write_cache`.
        value_cache: as in `write_cache`.
        slots: as in `write_cache`.
        interleaved: whether neighbours are rotated (GLM, Cohere), not halves (Llama).
        query_weight: [D], of a norm of each head before (Qwen 3, Gemma 3); None for none.
        key_weight: as query_weight.
        eps: of the norms.
        style: of the norms.
        key_scales: as in `write_cache`.
        value_scales: as in `write_cache`.

    Returns:
        The rotated query, [T, heads, D], contiguous.
    """
    rotated: torch.Tensor = _rotary_and_cache(
        query, keys, values, cos, sin, key_cache, value_cache, slots, interleaved,
        query_weight, key_weight, eps, style, key_scales, value_scales,
    )  # fmt: skip
    return rotated


def activation_and_mul(joined: torch.Tensor, *, activation: Activation = "silu") -> torch.Tensor:
    """Multiply act(gate) by up, from one tensor of both: [..., 2 * I], gate first; [..., I]."""
    y: torch.Tensor = _activation_and_mul(joined, activation)
    return y


@cache
def _runs_triton(device: torch.device, cache_dtype: torch.dtype | None) -> bool:
    """Whether Triton's kernels take tensors of this device, and caches of this dtype."""
    if find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda":
        return False
    if cache_dtype == torch.float8_e4m3fn:
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= FLOAT8
    return True


def _attention(cache: torch.Tensor) -> ModuleType:
    if not _runs_triton(cache.device, cache.dtype):
        return torch_attention
    from gptq_loader_kernels.attention import launch

    return launch


def _elementwise(tensor: torch.Tensor, *, cache: torch.dtype | None = None) -> ModuleType:
    if not _runs_triton(tensor.device, cache):
        return torch_elementwise
    from gptq_loader_kernels.attention import launch_elementwise

    return launch_elementwise


@torch.library.custom_op("gptq_loader::write_cache", mutates_args=CACHES)
def _write_cache(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> None:
    _elementwise(keys, cache=key_cache.dtype).write_cache(
        keys, values, key_cache, value_cache, slots, key_scales, value_scales
    )


@_write_cache.register_fake
def _write_cache_fake(*_: object) -> None:
    pass


@torch.library.custom_op("gptq_loader::paged_attention", mutates_args=())
def _paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
) -> torch.Tensor:
    result: torch.Tensor = _attention(key_cache).paged_attention(
        query, key_cache, value_cache, block_tables, lengths,
        scale, window, softcap, sinks, key_scales, value_scales,
    )  # fmt: skip
    return result


@_paged_attention.register_fake
def _paged_attention_fake(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, *_: object
) -> torch.Tensor:
    del key_cache
    return query.new_empty(query.shape[0], query.shape[1], value_cache.shape[3])


@torch.library.custom_op("gptq_loader::rms_norm", mutates_args=())
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, style: str) -> torch.Tensor:
    normed: torch.Tensor = _elementwise(x).rms_norm(x, weight, eps, style)
    return normed.contiguous()


@_rms_norm.register_fake
def _rms_norm_fake(x: torch.Tensor, *_: object) -> torch.Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("gptq_loader::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    style: str,
    post_weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    normed: torch.Tensor
    total: torch.Tensor
    normed, total = _elementwise(x).add_rms_norm(x, residual, weight, eps, style, post_weight)
    return normed.contiguous(), total.contiguous()


@_add_rms_norm.register_fake
def _add_rms_norm_fake(x: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("gptq_loader::rotary_and_cache", mutates_args=CACHES)
def _rotary_and_cache(  # noqa: PLR0913, PLR0917 - an operator's arguments
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
    rotated: torch.Tensor = _elementwise(query, cache=key_cache.dtype).rotary_and_cache(
        query, keys, values, cos, sin, key_cache, value_cache, slots, interleaved,
        query_weight, key_weight, eps, style, key_scales, value_scales,
    )  # fmt: skip
    return rotated


@_rotary_and_cache.register_fake
def _rotary_and_cache_fake(query: torch.Tensor, *_: object) -> torch.Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("gptq_loader::activation_and_mul", mutates_args=())
def _activation_and_mul(joined: torch.Tensor, activation: str) -> torch.Tensor:
    y: torch.Tensor = _elementwise(joined).activation_and_mul(joined, activation)
    return y


@_activation_and_mul.register_fake
def _activation_and_mul_fake(joined: torch.Tensor, activation: str) -> torch.Tensor:
    del activation
    return joined.new_empty(*joined.shape[:-1], joined.shape[-1] // 2)
