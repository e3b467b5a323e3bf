"""What shape a model is, by its config.json: its cache of keys and values above all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptq_loader_plugin.checkpoint.reader import Checkpoint

__all__ = ["cache_group", "kv_bytes_per_token"]


def cache_group(head_dim: int) -> int:
    """Give how many values of a head share a scale where keys and values have 8 bits, or 0."""
    return next((it for it in (64, 32, 16, 8) if head_dim % it == 0), 0)


def kv_bytes_per_token(checkpoint: Checkpoint, dtype: str, *, int8_cache: bool) -> int | None:
    """Work out what keys and values of one token take, from config.json where it tells.

    The cache keeps room for up to a quarter more tokens than it holds.
    """
    if not (checkpoint.folder / "config.json").is_file():
        return None
    config = checkpoint.model_config
    text = config.get("text_config", config)
    layers = text.get("num_hidden_layers", text.get("n_layer"))
    heads = text.get("num_attention_heads", text.get("n_head"))
    hidden = text.get("hidden_size", text.get("n_embd"))
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(hidden, int)):
        return None
    kv_heads = text.get("num_key_value_heads") or text.get("n_head_kv") or heads
    if text.get("new_decoder_architecture"):  # Falcon-40B's
        kv_heads = text.get("num_kv_heads") or kv_heads
    elif text.get("multi_query", text.get("model_type") in ("falcon", "gpt_bigcode")):
        kv_heads = 1
    head_dim = text.get("head_dim") or hidden // heads
    widths = 2 * kv_heads * head_dim
    if (latent := text.get("kv_lora_rank")) is not None:  # DeepSeek-V2's, one for all heads
        widths = latent + (text.get("qk_rope_head_dim") or 0)
    values, size = layers * widths, 4 if dtype == "float32" else 2
    if int8_cache and (group := cache_group(head_dim)):
        return values + values // group * 2 * size  # a scale and a zero for each group
    return int(values * size)
