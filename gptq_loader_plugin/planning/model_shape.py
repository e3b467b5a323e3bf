"""What shape a model is, by its config.json, whatever its family calls each number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

    from gptq_loader_plugin.checkpoint.reader import Checkpoint

__all__ = ["ModelShape", "kv_bytes_per_token", "shape_of"]

# The names that transformers' configs have for a number, the commonest first.
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
LAYERS = ("num_hidden_layers", "n_layer")
HEADS = ("num_attention_heads", "n_head")
HIDDEN = ("hidden_size", "n_embd")
INNER = ("intermediate_size", "n_inner")


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a model; None where config.json does not tell.

    Attributes:
        layers: decoder layers.
        hidden_size: the width of the residual stream.
        intermediate_size: the width inside an MLP.
        heads: query heads of a layer.
        kv_heads: heads of its keys and values.
        head_dim: the width of a head.
        latent_size: values of a position that latent attention keeps for all heads together
            (DeepSeek-V2); None elsewhere.
        vocab_size: the rows of the embedding.
        context: the longest sequence that the model is meant for.
        longest_context: the longest one that its positions are stretched to, where that is more.
    """

    layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    latent_size: int | None = None
    vocab_size: int | None = None
    context: int | None = None
    longest_context: int | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], *, tokenizer_length: int | None = None) -> ModelShape:
        """Read the shape of a model's language part.

        Args:
            config: a config.json, or a transformers config as a mapping.
            tokenizer_length: `model_max_length` of the tokenizer's config.
        """
        text = config.get("text_config")
        text = text if isinstance(text, dict) else config
        hidden, heads = _number(text, *HIDDEN), _number(text, *HEADS)
        head_dim = _number(text, "head_dim")
        if head_dim is None and hidden and heads:
            head_dim = hidden // heads
        latent = _number(text, "kv_lora_rank")
        if latent is not None:
            latent += _number(text, "qk_rope_head_dim") or 0
        context, longest = _contexts(text, tokenizer_length)
        return cls(
            layers=_number(text, *LAYERS),
            hidden_size=hidden,
            intermediate_size=_number(text, *INNER),
            heads=heads,
            kv_heads=_kv_heads(text, heads),
            head_dim=head_dim,
            latent_size=latent,
            vocab_size=_number(text, "vocab_size"),
            context=context,
            longest_context=longest,
        )

    @classmethod
    def of_config(cls, config: PreTrainedConfig) -> ModelShape:
        """Read the shape of transformers' own config, by its attributes' other names too."""
        text: Any = config.get_text_config()
        aliases = {name: getattr(text, name, None) for name in text.attribute_map}
        return cls.of({**text.to_dict(), **aliases})

    @property
    def kv_width(self) -> int | None:
        """The values that one layer keeps of one position."""
        if self.latent_size is not None:
            return self.latent_size
        if self.kv_heads is None or self.head_dim is None:
            return None
        return 2 * self.kv_heads * self.head_dim


def shape_of(checkpoint: Checkpoint) -> ModelShape:
    """Return the shape of a checkpoint's model, of which nothing is known without config.json.

    Raises:
        ConfigInvalid: its config.json does not parse, or names no model type.
    """
    if not (checkpoint.folder / "config.json").is_file():
        return ModelShape()
    length = _tokenizer_length(checkpoint.folder / "tokenizer_config.json")
    return ModelShape.of(checkpoint.model_config, tokenizer_length=length)


def kv_bytes_per_token(shape: ModelShape, dtype: str, *, int8_cache: bool) -> int | None:
    """Return what keys and values of one token take; None where the shape does not tell.

    The cache keeps room for up to a quarter more tokens than it holds.

    Args:
        shape: the model's.
        dtype: of keys and values, as torch names it.
        int8_cache: whether they are kept in 8 bits.
    """
    if shape.layers is None or shape.kv_width is None:
        return None
    values = shape.layers * shape.kv_width
    if int8_cache and shape.head_dim:
        return values + 4 * values // shape.head_dim  # a scale for each head
    return values * (4 if dtype == "float32" else 2)


def _contexts(
    text: Mapping[str, Any], tokenizer_length: int | None
) -> tuple[int | None, int | None]:
    """Return the context a config means, and the one that its rotation is stretched to.

    YaRN multiplies the length the model was trained at. What linear and dynamic scaling multiply is
    what the config says, which some writers have stretched already: they say it in another field,
    or in the tokenizer's config. The other rotations' configs have the stretched length.
    """
    stated = _number(text, *CONTEXT)
    rope: Any = text.get("rope_parameters") or text.get("rope_scaling")
    factor = rope.get("factor") if isinstance(rope, dict) else None
    if stated is None or not isinstance(factor, int | float) or factor <= 1:
        return stated, stated
    kind = rope.get("rope_type", rope.get("type"))
    if kind == "yarn":
        trained = _number(rope, "original_max_position_embeddings") or stated
        longest = max(stated, round(trained * factor))
        return longest, longest
    # Gemma 3 stretches its full attention alone, and states what that comes to.
    if kind not in ("linear", "dynamic") or "rope_local_base_freq" in text:
        return stated, stated
    longest = round(stated * factor)
    meant = _number(text, "max_sequence_length", "model_max_length") or tokenizer_length or longest
    return min(max(meant, stated), longest), longest


def _tokenizer_length(file: Path) -> int | None:
    """Return the longest sequence that a tokenizer's config names, where it is there and sane."""
    try:
        stated = read_json(file)
    except (OSError, ConfigInvalid):  # what is wrong with it is told where it is needed
        return None
    return _number(stated, "model_max_length")


def _kv_heads(text: Mapping[str, Any], heads: int | None) -> int | None:
    if text.get("new_decoder_architecture"):  # Falcon-40B's
        return _number(text, "num_kv_heads") or heads
    if text.get("multi_query", text.get("model_type") in ("falcon", "gpt_bigcode")):
        return 1
    return _number(text, "num_key_value_heads", "n_head_kv") or heads


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    values = (config.get(name) for name in names)
    return next((int(value) for value in values if _is_size(value)), None)


def _is_size(value: object) -> TypeGuard[int | float]:
    """Whether a config's value is a size: a whole number above zero, however it is written."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value > 0 and value == int(value)
