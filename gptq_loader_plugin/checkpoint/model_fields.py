"""Read the fields of a config.json as they are meant: "4096" and 4096.0 are 4096.

Editors, converters and other programs write numbers as texts and as floats. What cannot be meant
at all, such as a hidden size of 0, is an error that names the field, before anything is built.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import ConfigInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["read_fields"]

WHOLE = re.compile(r"\s*[-+]?\d+(\.0*)?\s*")
BOOLEANS = {"true": True, "false": False}
# Fields that hold whole numbers, by how their names are made.
COUNTS = re.compile(
    r"(n|num|max)_\w+|\w+_(size|dim|rank|heads?|layers?|experts|positions|window|tok)"
)
TOKEN_IDS = re.compile(r"(bos|eos|pad|unk|sep|decoder_start)_token_id")
# Sizes that a model has, whatever it is: a whole number above zero where they are a single value.
SIZES = (
    "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head",
    "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size", "moe_intermediate_size",
    "kv_lora_rank",
)  # fmt: skip
CONTEXTS = ("max_position_embeddings", "n_positions")
DTYPES = {
    "half": "float16", "fp16": "float16", "float16": "float16", "bf16": "bfloat16",
    "bfloat16": "bfloat16", "float": "float32", "fp32": "float32", "float32": "float32",
}  # fmt: skip
LARGEST = 1 << 40  # of any size: more is no number of values that a machine has


def read_fields(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Return what a config.json, or a generation_config.json, means.

    Args:
        config: its content.
        file: where it is, for messages.

    Raises:
        ConfigInvalid: a field has a value that no model can have; it is named.
    """
    fields = {name: _value(name, value, file) for name, value in config.items()}
    for name in ("torch_dtype", "dtype"):  # the tensors say what they are
        if name in fields and fields[name] is None:
            del fields[name]
    for name in CONTEXTS:  # one that is no size says that it has no limit
        value = fields.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value <= 0:
            del fields[name]
    for name in (*SIZES, *CONTEXTS):
        value = fields.get(name)
        if value is None or isinstance(value, list | dict):  # a list has one for each layer
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= LARGEST:
            raise _invalid(name, config[name], "a whole number above zero", file)
    return fields


def _value(name: str, value: Any, file: Path) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return read_fields(value, file) if name == "text_config" else value
    if name in ("torch_dtype", "dtype"):
        return DTYPES.get(str(value).lower().removeprefix("torch."))
    if TOKEN_IDS.fullmatch(name):
        return _token_ids(name, value, file)
    if isinstance(value, str) and value.strip().lower() in BOOLEANS:
        return BOOLEANS[value.strip().lower()]
    return _whole(value) if COUNTS.fullmatch(name) else value


def _token_ids(name: str, value: Any, file: Path) -> int | list[int] | None:  # noqa: ANN401 - JSON
    """Return a token's id, or several; an empty list and a number below zero are none."""
    several = value if isinstance(value, list) else [value]
    ids = [_whole(item) for item in several]
    for item in ids:
        if item is not None and (isinstance(item, bool) or not isinstance(item, int)):
            raise _invalid(name, value, "a token's id, or a list of them", file)
    kept = [item for item in ids if item is not None and item >= 0]
    if not isinstance(value, list):
        return kept[0] if kept else None
    return kept or None


def _whole(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return the whole number that a text or a float is; anything else as it is."""
    if isinstance(value, str) and WHOLE.fullmatch(value):
        return int(value.partition(".")[0])
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _invalid(name: str, value: object, expected: str, file: Path) -> ConfigInvalid:
    return ConfigInvalid(
        f"{name} is {json.dumps(value, default=str)[:60]}; it must be {expected}",
        path=file,
        hint=f"correct {name}, or copy config.json from the model this was made of",
    )
