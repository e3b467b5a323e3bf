"""Latent attention, as DeepSeek-V2's: what its parts are, and how the library reads them.

transformers keeps a latent of each position and what is rotated beside it. The step attends to the
latents themselves: a head's query is multiplied by what would make its keys of them, and its answer
by what makes values, so that keys and values are never made.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_kernels.cpu.families import find
from gptq_loader_kernels.cpu.library import COLUMNS, load_library
from gptq_loader_kernels.cpu.linear import TYPES, NativeLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_kernels.cpu.families import Family
    from gptq_loader_kernels.cpu.library import Isa

__all__ = ["LATENT_NORMS", "latent_norms", "latent_sizes", "other_latents", "parted", "written_to"]

EXPANDED = "self_attn.kv_b_proj"
LATENT_NORMS = {"q_norm": "self_attn.q_a_layernorm", "kv_norm": "self_attn.kv_a_layernorm"}
LANES = 16
MAX_KEY = 1024  # numbers of a latent and what is rotated


def latent_sizes(decoder: Any) -> dict[str, tuple[int, int]]:  # noqa: ANN401
    """Return the outputs and inputs of each projection of latent attention."""
    config = decoder.config
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    plain, rotated, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    before = config.q_lora_rank
    return {
        "q_a": (before or 0, hidden), "q": (heads * (plain + rotated), before or hidden),
        "k": (rank + rotated, hidden), "kv_b": (heads * (plain + value), rank),
        "o": (hidden, heads * value),
    }  # fmt: skip


def latent_norms(layer: Any) -> Iterator[tuple[str, str, Any]]:  # noqa: ANN401
    """Go through the norms of a layer's latent attention: place, path and module."""
    for name, path in LATENT_NORMS.items():
        if (norm := find(layer, path)) is not None:
            yield name, path, norm


def other_latents(decoder: Any, family: Family) -> str | None:  # noqa: ANN401
    """Say what latent attention does here that the step does not."""
    if not family.latent:
        return None
    config, first = decoder.config, decoder.layers[0].self_attn
    if not hasattr(first, "expand_kv"):
        return "this transformers keeps keys and values of all heads: install 5.15 or newer"
    if config.kv_lora_rank % LANES or config.qk_rope_head_dim % LANES:
        return (
            f"its latents are {config.kv_lora_rank} and {config.qk_rope_head_dim} wide; the step "
            f"takes multiples of {LANES}"
        )
    if max(config.kv_lora_rank + config.qk_rope_head_dim, config.qk_nope_head_dim) > MAX_KEY:
        return f"its latents are wider than {MAX_KEY}"
    if any(find(it, EXPANDED).bias is not None for it in decoder.layers):
        return f"{EXPANDED} has a bias, of which the step has nothing"
    return None


def parted(
    decoder: Any,  # noqa: ANN401
    layer: Any,  # noqa: ANN401
    dtype: torch.dtype,
    isa: Isa,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what makes keys of latents, and values, of every head, from a layer's `kv_b_proj`.

    Returns:
        Weights of `dtype` [heads, kv_lora_rank, qk_nope_head_dim] and [heads, v_head_dim,
        kv_lora_rank].
    """
    config = decoder.config
    plain, value = config.qk_nope_head_dim, config.v_head_dim
    weight = _transposed(find(layer, EXPANDED), dtype, isa).t()
    heads = weight.reshape(config.num_attention_heads, plain + value, config.kv_lora_rank)
    keys, values = heads.split((plain, value), dim=1)
    return keys.transpose(1, 2).contiguous(), values.contiguous()


def written_to(decoder: Any, family: Family) -> list[torch.Tensor]:  # noqa: ANN401
    """Return the tensors that `parted` copies from, of every layer."""
    if not family.latent:
        return []
    modules = [find(layer, EXPANDED) for layer in decoder.layers]
    return [it for module in modules for it in (*module.parameters(), *module.buffers())]


def _transposed(module: Any, dtype: torch.dtype, isa: Isa) -> torch.Tensor:  # noqa: ANN401 - a linear of either kind
    """Return the weight [inputs, outputs] of a linear, rounded once."""
    if not isinstance(module, NativeLinear):
        plain: torch.Tensor = module.weight.detach().to(dtype).t()
        return plain
    tiles = -(-module.out_features // COLUMNS)
    weight = torch.empty(module.in_features, tiles * COLUMNS, dtype=dtype, device="cpu")
    load_library().gptq_unpack(
        ctypes.addressof(module.filled()), 0, tiles, weight.data_ptr(), TYPES[dtype], isa,
        torch.get_num_threads(),
    )  # fmt: skip
    return weight[:, : module.out_features]
