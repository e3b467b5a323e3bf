"""What the parts of a decoder are, read from its modules and its config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_kernels.cpu.families import find
from gptq_loader_kernels.cpu.latents import latent_sizes

if TYPE_CHECKING:
    import torch

    from gptq_loader_kernels.cpu.families import Family

__all__ = [
    "angle_tables",
    "attention_of",
    "embed",
    "head_dim_of",
    "is_parallel",
    "kv_heads_of",
    "last_norm_of",
    "neighbours_of",
    "norm_of",
    "norms_of",
    "projection_sizes",
    "residual_of",
    "rotary_sizes",
    "rotated_of",
    "sinks_of",
    "softcap_of",
    "table_of",
    "window_of",
]


def attention_of(layer: Any, family: Family) -> Any:  # noqa: ANN401
    """Return the attention of a layer."""
    return find(layer, family.attention)


def last_norm_of(decoder: Any, family: Family) -> Any:  # noqa: ANN401
    """Return the norm after a decoder's layers."""
    return find(decoder, family.last_norm)


def embed(decoder: Any, family: Family, tokens: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
    """Return the embeddings of tokens, as a decoder's own forward looks them up."""
    embedded: torch.Tensor = find(decoder, family.embedding)(tokens)
    return embedded


def head_dim_of(decoder: Any, family: Family) -> int:  # noqa: ANN401
    """Return how wide a decoder's heads of keys are: a latent, and what is rotated."""
    if family.latent:
        return int(decoder.config.kv_lora_rank + decoder.config.qk_rope_head_dim)
    attention = attention_of(decoder.layers[0], family)
    dim: int = attention.head_size if hasattr(attention, "head_size") else attention.head_dim
    return dim


def kv_heads_of(config: Any, family: Family) -> int:  # noqa: ANN401
    """Return how many heads of keys and values a model has: as many as of queries, if not said."""
    if family.latent:
        return 1  # for all
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def projection_sizes(decoder: Any, family: Family) -> dict[str, tuple[int, int]]:  # noqa: ANN401
    """Return the outputs and inputs of each projection of a layer."""
    config, dim = decoder.config, head_dim_of(decoder, family)
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * dim, kv_heads_of(config, family) * dim
    heads = {
        "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
    }  # fmt: skip
    return {
        **(latent_sizes(decoder) if family.latent else heads), "gate": (intermediate, hidden),
        "up": (intermediate, hidden), "down": (hidden, intermediate),
    }  # fmt: skip


def rotated_of(decoder: Any, family: Family) -> int:  # noqa: ANN401
    """Return how much of a head may be rotated at most; all that can be, of a latent one."""
    return int(decoder.config.qk_rope_head_dim) if family.latent else head_dim_of(decoder, family)


def neighbours_of(decoder: Any, family: Family) -> int:  # noqa: ANN401
    """Return whether heads are rotated by neighbours: 0, 1, or 2 where these are parted then."""
    if isinstance(family.neighbours, bool):
        return int(family.neighbours)
    return 2 if getattr(decoder.config, family.neighbours) else 0


def angle_tables(decoder: Any, family: Family) -> tuple[str, ...]:  # noqa: ANN401
    """Return the types of layers that are rotated by angles of their own, or ()."""
    return tuple(sorted(set(decoder.config.layer_types))) if family.angles_by_type else ()


def rotary_sizes(decoder: Any, family: Family) -> set[int]:  # noqa: ANN401
    """Return how much of a head is rotated, of each table of angles."""
    names = [f"{it}_inv_freq" for it in angle_tables(decoder, family)] or ["inv_freq"]
    tables = [getattr(decoder.rotary_emb, name, None) for name in names]
    head_dim = head_dim_of(decoder, family)
    return {head_dim if table is None else 2 * table.numel() for table in tables}


def sinks_of(layer: Any, family: Family) -> Any:  # noqa: ANN401
    """Return the scores [heads] that join the softmax of a layer's heads, or None."""
    return find(attention_of(layer, family), family.sinks) if family.sinks else None


def softcap_of(layer: Any, family: Family) -> float:  # noqa: ANN401
    """Return what a layer's scores are capped at, or 0."""
    return (
        float(getattr(attention_of(layer, family), family.softcap) or 0) if family.softcap else 0.0
    )


def window_of(decoder: Any, family: Family, index: int) -> int:  # noqa: ANN401
    """Return how many positions a layer attends to, or 0 for all: by the config, as its mask."""
    config = decoder.config
    kinds = getattr(config, "layer_types", None)
    if family.slides or (kinds and kinds[index] == "sliding_attention"):
        return int(config.sliding_window or 0)
    return 0


def table_of(decoder: Any, family: Family, index: int) -> int:  # noqa: ANN401
    """Return which table of angles a layer is rotated by, or -1 for none."""
    attention = attention_of(decoder.layers[index], family)
    if family.rotates is not None and not getattr(attention, family.rotates):
        return -1
    tables = angle_tables(decoder, family)
    return tables.index(decoder.config.layer_types[index]) if tables else 0


def residual_of(layer: Any) -> float:  # noqa: ANN401
    """Return what a layer multiplies by what it adds."""
    return float(getattr(layer, "residual_multiplier", 1.0))


def is_parallel(layer: Any, family: Family) -> bool:  # noqa: ANN401
    """Return whether attention and the feed-forward part of a layer read the same x."""
    return family.parallel or bool(getattr(layer, "use_parallel_residual", False))


def norms_of(layer: Any, family: Family) -> dict[str, str]:  # noqa: ANN401
    """Return the paths of the norms that a layer has, by the places that they have."""
    setting = family.normed_heads
    plain = setting is not None and not getattr(attention_of(layer, family), setting)
    heads = ("q_norm", "k_norm") if plain else ()
    return {name: path for name, path in family.norms.items() if name not in heads}


def norm_of(layer: Any, family: Family, name: str) -> Any:  # noqa: ANN401
    """Return a norm of a layer; parallel parts may share the first one."""
    norm = find(layer, family.norms[name])
    if norm is None and name == "feed_forward_norm" and is_parallel(layer, family):
        return find(layer, family.norms["input_norm"])
    return norm
