"""Read a LoRA adapter as the package peft saves one: adapter_config.json and safetensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.errors import (
    CheckpointNotFound,
    ConfigInvalid,
    CorruptCheckpoint,
    UnsupportedFormat,
)
from gptq_loader_plugin.reference import resolve

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from gptq_loader_plugin.plugins import Plugins

__all__ = ["AdapterFile", "read_adapter", "read_adapters"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PAIR = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<which>[AB])(?:\.\w+)?\.weight")
WHOLE = re.compile(
    r"(?:base_model\.model\.)?(?P<path>(?:.+\.)?(?:embed_tokens|lm_head))(?:\.base_layer)?\.weight"
)
# What peft can do beside, by the field of its config, where that is neither of these.
NEUTRAL: tuple[object, ...] = (None, False, [], {}, "none")
MORE = (
    ("use_dora", "DoRA scales whole weights"),
    ("bias", "it has biases"),
    ("modules_to_save", "it has whole layers of its own"),
    ("target_parameters", "it changes parameters that are no layer's"),
    ("trainable_token_indices", "it has embeddings of its own"),
    ("layer_replication", "it repeats layers"),
    ("alora_invocation_tokens", "it is active from some token on"),
    ("use_bdlora", "its matrices are block-diagonal"),
    ("arrow_config", "it chooses among others"),
)


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as it was saved.

    Attributes:
        pairs: of each linear by its path, A [rank, in_features], B [out_features, rank], and what
            their product is scaled by.
        rank: of most.
        base: the model that it was trained on, as its config names it.
        whole: weights of that model's that were saved beside: embeddings, where it changes the
            output head.
        folder: where it lies.
    """

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor, float]]
    rank: int
    base: str = ""
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    folder: Path | None = None


def read_adapters(references: Mapping[str, str | Path], plugins: Plugins) -> dict[str, AdapterFile]:
    """Read LoRA adapters by their names, before the model, which takes longer."""
    return {name: read_adapter(resolve(it, plugins=plugins)) for name, it in references.items()}


def read_adapter(folder: Path) -> AdapterFile:
    """Read an adapter.

    Raises:
        CheckpointNotFound: the folder holds none.
        ConfigInvalid: its config does not parse.
        CorruptCheckpoint: its weights cannot be read, or half of a pair is missing.
        UnsupportedFormat: it is of a kind that is more than a pair for each linear.
    """
    config = _read_config(folder)
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise UnsupportedFormat(
            f"a {config['peft_type']} adapter, and no LoRA",
            path=folder,
            hint="merge it into its model with peft, and quantise that",
        )
    for name, why in MORE:
        if config.get(name) not in NEUTRAL:
            raise UnsupportedFormat(
                f"{name} is {config[name]!r}: {why}",
                path=folder / CONFIG,
                hint="merge it into its model with peft, and quantise that",
            )
    tensors = _read_tensors(folder)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if embedding := WHOLE.fullmatch(key):
            whole[embedding["path"]] = tensor
            continue
        match = PAIR.fullmatch(key)
        if match is None or tensor.dim() != 2:
            raise UnsupportedFormat(
                f"the tensor {key} is no part of a linear's pair",
                path=folder / WEIGHTS,
                hint="merge the adapter into its model with peft, and quantise that",
            )
        halves.setdefault(match["path"], {})[match["which"]] = tensor
    pairs = {}
    for path, pair in halves.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise CorruptCheckpoint(
                f"A and B of {path} do not go together",
                path=folder / WEIGHTS,
                hint="save the adapter anew",
            )
        pairs[path] = pair["A"], pair["B"], _scaling(config, path, pair["A"].shape[0], folder)
    rank = next(iter(pairs.values()))[0].shape[0] if pairs else 0
    base = str(config.get("base_model_name_or_path") or "")
    return AdapterFile(pairs, rank, base, whole, folder)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.is_file():
        raise CheckpointNotFound(
            f"{folder} holds no LoRA adapter: there is no {CONFIG}",
            reference=str(folder),
            tried=[str(file)],
            hint="name the folder that peft saved: save_pretrained(FOLDER)",
        )
    return read_json(file)


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / WEIGHTS
    if not file.is_file():
        raise CheckpointNotFound(
            f"{folder} holds no {WEIGHTS}",
            reference=str(folder),
            tried=[str(file)],
            hint="save the adapter with peft's save_pretrained, which writes safetensors; a .bin "
            "is a pickle",
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CorruptCheckpoint(
            f"cannot be read: {error}", path=file, hint="download or copy it anew"
        ) from error


def _scaling(config: Mapping[str, Any], path: str, rank: int, folder: Path) -> float:
    """Return what a pair's product is scaled by: alpha / rank, or by the root where it says so."""
    alpha = _of_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", rank))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ConfigInvalid(
            f"lora_alpha is {alpha!r}, which is no number",
            path=folder / CONFIG,
            hint="save the adapter anew",
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: object, path: str, otherwise: Any) -> Any:  # noqa: ANN401 - JSON
    """Return the value of the first pattern that a path ends with, as peft matches them."""
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return otherwise
