"""Compare the sizes in a config.json with the tensors' headers, before anything is built."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["check_sizes"]

BLOCK = re.compile(r".*?\.(\d+)\.")  # model.layers.0.
BLOCKS = ("num_hidden_layers", "n_layer", "num_layers")
LOOPED = ("num_layers_per_stack",)
WIDTHS = ("hidden_size", "n_embd")
# No more than the largest side of any tensor, times what a fused one may hide.
BOUNDED = (
    "intermediate_size", "n_inner", "moe_intermediate_size", "vocab_size", "head_dim",
    "num_attention_heads", "n_head", "num_key_value_heads", "num_experts", "num_local_experts",
    "n_routed_experts", "kv_lora_rank", "q_lora_rank", "v_head_dim", "qk_rope_head_dim",
    "qk_nope_head_dim",
)  # fmt: skip
SLACK = 8
CONTEXTS = ("max_position_embeddings", "n_positions")
LONGEST = 1 << 27  # tokens: no model has been made for more, and some compute a table of all


def check_sizes(
    config: Mapping[str, Any],
    headers: Mapping[str, TensorInfo],
    layers: Iterable[LayerSpec],
    file: Path,
) -> None:
    """Refuse a config whose model would be far larger than its tensors.

    Args:
        config: what config.json says.
        headers: every tensor's header.
        layers: the quantised layers, whose tensors' sides are not the layers'.
        file: the config.json, for messages.

    Raises:
        ConfigInvalid: a size is not the tensors'; it is named, and a tensor that contradicts it.
    """
    text = config.get("text_config")
    fields = text if isinstance(text, dict) else config
    sides: dict[int, str] = {}
    for name, side in _sides(headers, layers):
        sides.setdefault(side, name)
    if not sides:
        return
    blocks = {match[0]: name for name in headers if (match := BLOCK.match(name))}
    kinds = fields.get("layer_types")
    # Dory's config counts a block's attention and its mlp apart.
    counted = 2 if isinstance(kinds, list) and "mlp" in kinds else 1
    # Where a config counts the loops over its blocks too, it says how many blocks those are.
    names = LOOPED if any(name in fields for name in LOOPED) else BLOCKS
    for field, value in _stated(fields, names):
        if value > len(blocks) * counted:
            last = list(blocks.values())[-1] if blocks else next(iter(headers))
            raise _contradicted(field, value, f"{len(blocks)} blocks, the last with {last}", file)
    for field, value in _stated(fields, WIDTHS):
        if value not in sides:
            name = _embedding(headers) or sides[max(sides)]
            shape = list(headers[name].shape) if name in headers else sorted(sides)[-3:]
            raise _contradicted(field, value, f"{name} of {shape}", file)
    for field, value in _stated(fields, BOUNDED):
        if value > max(sides) * SLACK:
            raise _contradicted(
                field, value, f"no side longer than {max(sides)}, of {sides[max(sides)]}", file
            )
    _check_contexts(fields, file)


def _check_contexts(fields: Mapping[str, Any], file: Path) -> None:
    for field, value in _stated(fields, CONTEXTS):
        if value > LONGEST:
            raise ConfigInvalid(
                f"{field} is {value}; no model takes more than {LONGEST} tokens",
                path=file,
                hint=f"correct {field}, or copy config.json from the model this was made of",
            )


def _sides(
    headers: Mapping[str, TensorInfo], layers: Iterable[LayerSpec]
) -> Iterator[tuple[str, int]]:
    """List the sides of all tensors, and of the weights of packed ones."""
    for name, info in headers.items():
        for side in info.shape:
            yield name, side
        if len(info.shape) > 1:
            yield name, math.prod(info.shape[1:])
    for layer in layers:
        yield layer.name, layer.in_features
        yield layer.name, layer.out_features


def _stated(fields: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, int]]:
    for name in names:
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value


def _embedding(headers: Mapping[str, TensorInfo]) -> str | None:
    return next((name for name in headers if "embed" in name or name.endswith("wte.weight")), None)


def _contradicted(field: str, value: int, tensors: str, file: Path) -> ConfigInvalid:
    return ConfigInvalid(
        f"{field} is {value}; the tensors have {tensors}",
        path=file,
        hint=f"correct {field}, or copy config.json from the model this was made of",
    )
