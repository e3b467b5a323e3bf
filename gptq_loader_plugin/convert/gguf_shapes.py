"""A model's shape as GGUF has it: its architecture, its keys, and what its tensors become.

llama.cpp computes some families otherwise than transformers does, and its files are made for that:
Llama's queries and keys have the halves of each rotated pair side by side, and Gemma's norms hold
what they multiply by, where transformers adds one to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.errors import UnsupportedFormat

if TYPE_CHECKING:
    from pathlib import Path

    from gguf import GGUFWriter
    from numpy.typing import NDArray

__all__ = ["Family", "check_computed_alike", "family_of", "rope_tensors", "write_shape"]


# Of families whose layers see everything or a window by turns: every so many, a layer sees all.
EVERY = {"gemma2": 2, "gemma3": 6}
LARGEST = (46, 62)  # layers of Gemma 2 and 3 of 27B, whose queries llama.cpp scales otherwise
BEYOND = "replies differ beyond the context the model was first made for"


@dataclass(frozen=True, slots=True)
class Family:
    """How llama.cpp knows a family.

    Attributes:
        architecture: its name there.
        turned: whether queries and keys have another order of rows.
        norms_add_one: whether transformers adds one to the norms' weights.
    """

    architecture: str
    turned: bool = False
    norms_add_one: bool = False


FAMILIES = {
    "llama": Family("llama", turned=True),
    "mistral": Family("llama", turned=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norms_add_one=True),
    "gemma2": Family("gemma2", norms_add_one=True),
    "gemma3_text": Family("gemma3", norms_add_one=True),
    "gemma3": Family("gemma3", norms_add_one=True),
    "phi3": Family("phi3"),
}


def family_of(model_type: str, path: Path) -> Family:
    """Find a model type's family.

    Raises:
        UnsupportedFormat: it is none that can be written here.
    """
    if model_type not in FAMILIES:
        raise UnsupportedFormat(
            f"models of type {model_type} cannot be written as GGUF here",
            path=path,
            hint=f"these can: {', '.join(FAMILIES)}; for another, convert to dense and give that "
            "to llama.cpp's convert_hf_to_gguf",
        )
    return FAMILIES[model_type]


def write_shape(writer: GGUFWriter, config: Any, family: Family) -> list[str]:  # noqa: ANN401 - transformers' config
    """Write the keys of a model's shape; return what a user should know.

    Args:
        writer: the file's.
        config: the text part of transformers' config.
        family: the model's.
    """
    heads = config.num_attention_heads
    head_dim = _head_dim(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(_rotated(config, rope))
    if local := config.rope_parameters.get("sliding_attention"):
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    notes = _write_scaling(writer, config, rope)
    if family.architecture in EVERY:
        writer.add_sliding_window(config.sliding_window)
    elif window := _window(config):
        notes.append(
            f"llama.cpp lets a token see all before it, and in this model it sees {window:,}: "
            "replies differ beyond that"
        )
    if family.architecture == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    if soft := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(soft)
    if soft := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(soft)
    return notes


def check_computed_alike(config: Any, family: Family, path: Path) -> None:  # noqa: ANN401 - as above
    """Refuse what llama.cpp takes from a family's name, where this model differs from it.

    Raises:
        UnsupportedFormat: it would compute something else.
    """
    every = EVERY.get(family.architecture)
    if every is None:
        return
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    scaled = config.hidden_size // heads if layers in LARGEST else _head_dim(config)
    if config.query_pre_attn_scalar != scaled:
        wrong = f"it divides queries by the root of {config.query_pre_attn_scalar}"
        right = f"of {scaled}"
    else:
        usual = ["full_attention" if (i + 1) % every == 0 else "sliding_attention"
                 for i in range(layers)]  # fmt: skip
        if list(config.layer_types) == usual:
            return
        wrong, right = "other layers than usual see everything", f"every {every}th"
    raise UnsupportedFormat(
        f"{wrong}, and llama.cpp's {family.architecture} takes that as {right}",
        path=path,
        hint="convert it to dense or compressed-tensors, which other engines read",
    )


def rope_tensors(config: Any, family: Family) -> dict[str, NDArray[np.float32]]:  # noqa: ANN401 - as above
    """Return the factors by which frequencies are divided, where the model has some."""
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(rope, _rotated(config, rope))}
    if kind in ("longrope", "su", "yarn") and family.architecture == "phi3":
        return {
            "rope_factors_long.weight": np.array(rope["long_factor"], np.float32),
            "rope_factors_short.weight": np.array(rope["short_factor"], np.float32),
        }
    return {}


def _head_dim(config: Any) -> int:  # noqa: ANN401 - as above
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _rope(config: Any) -> dict[str, Any]:  # noqa: ANN401 - as above
    """Return how positions turn: of Gemma 3, in the layers that see everything."""
    rope = dict(config.rope_parameters)
    return {"rope_theta": 10000.0, **rope.get("full_attention", rope)}


def _rotated(config: Any, rope: dict[str, Any]) -> int:  # noqa: ANN401 - as above
    share = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None)
    return int(_head_dim(config) * (share or 1.0))


def _window(config: Any) -> int | None:  # noqa: ANN401 - as above
    """Return how far a token sees, None where it sees everything."""
    used = getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None) if used else None
    return window if window and window < config.max_position_embeddings else None


def _write_scaling(writer: GGUFWriter, config: Any, rope: dict[str, Any]) -> list[str]:  # noqa: ANN401 - as above
    from gguf import RopeScalingType

    kind = rope.get("rope_type", "default")
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    if kind in ("default", "llama3"):
        return []
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
        return []
    if kind in ("longrope", "su") and original:
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = config.max_position_embeddings / original
        stretched = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
        writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or stretched)
        return []
    if kind == "yarn" and original:
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(original)
        return []
    return [f"llama.cpp knows no positions of kind {kind}: {BEYOND}"]


def _llama3_factors(rope: dict[str, Any], dimensions: int) -> NDArray[np.float32]:
    """Divide low frequencies by `factor`, and those between by less, as Llama 3.1 does."""
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, dimensions, 2) / dimensions)
    lengths = 2 * math.pi / frequencies
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((context / lengths - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors
