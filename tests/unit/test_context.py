"""The context is what a config means by it: its positions stretched, or stretched already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE, copy, edit_json, off_by

import gptq_loader_plugin as gptq
from gptq_loader_plugin.planning.model_shape import ModelShape

if TYPE_CHECKING:
    from pathlib import Path

STRETCHED = [
    # Qwen2 and Qwen2.5, with the block that their cards tell to add.
    ({"rope": {"type": "yarn", "factor": 4.0, "original": 64}}, None, 256, 256),
    # DeepSeek-V3 and gpt-oss state the stretched length.
    ({"length": 256, "rope": {"rope_type": "yarn", "factor": 4.0, "original": 64}}, None, 256, 256),
    ({"rope": {"type": "yarn", "factor": 4.0}}, None, 256, 256),
    # Vicuna 1.5 16K.
    ({"rope": {"type": "linear", "factor": 4.0}, "max_sequence_length": 256}, 256, 256, 256),
    ({"rope": {"type": "linear", "factor": 4.0}}, None, 256, 256),
    # deepseek-coder: 16,384 is what 4,096 was stretched to, and its tokenizer says so.
    ({"rope": {"type": "linear", "factor": 4.0}}, 64, 64, 256),
    ({"rope": {"type": "dynamic", "factor": 2.0}}, None, 128, 128),
    ({"rope": {"type": "linear", "factor": 4.0}}, 10**30, 256, 256),
    # Gemma 3, in either way to write it.
    ({"rope": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e4}, None, 64, 64),
    ({"nested": {"rope_type": "linear", "factor": 8.0}}, None, 64, 64),
    # Llama 3.1 and Phi-3 128K.
    ({"rope": {"rope_type": "llama3", "factor": 8.0, "original": 8}}, None, 64, 64),
    ({"rope": {"type": "longrope", "factor": 32.0, "original": 8}}, None, 64, 64),
    ({"rope": {"type": "default", "mrope_section": [1, 2]}}, None, 64, 64),
    ({}, None, 64, 64),
    ({"length": 64.0}, None, 64, 64),
    ({"length": -1}, None, None, None),
    ({"length": 1e400}, None, None, None),
    ({"length": None}, None, None, None),
]


@pytest.mark.parametrize(("fields", "tokenizer_length", "context", "longest"), STRETCHED, ids=str)
def test_the_context_of_a_config(
    fields: dict[str, Any], tokenizer_length: int | None, context: int | None, longest: int | None
) -> None:
    fields = dict(fields)
    config: dict[str, Any] = {"max_position_embeddings": fields.pop("length", 64)}
    if rope := fields.pop("rope", None):
        if "original" in rope:
            rope = {**rope, "original_max_position_embeddings": rope["original"]}
        config["rope_scaling"] = rope
    if nested := fields.pop("nested", None):
        local = {"rope_type": "default"}
        config["rope_parameters"] = {"full_attention": nested, "sliding_attention": local}
    shape = ModelShape.of({**config, **fields}, tokenizer_length=tokenizer_length)
    assert (shape.context, shape.longest_context) == (context, longest)


@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic"])
def test_a_stretched_model_takes_the_stretched_length(kind: str, tmp_path: Path) -> None:
    folder = stretch(copy(ONE, tmp_path / "model"), kind)
    with gptq.load(folder) as model:
        assert model.context == 256
        ids = model.tokenizer(" ".join(["word"] * 60))["input_ids"]
        assert 64 < len(ids) < 250
        assert model.generate(" ".join(["word"] * 60), max_tokens(3)).tokens > 0
    with gptq.load(folder, context=100) as model:
        assert model.context == 100
    with pytest.raises(gptq.OptionInvalid, match="2 to 256"):
        gptq.load(folder, context=257)


def test_a_tokenizer_that_says_less_can_be_overruled(tmp_path: Path) -> None:
    folder = stretch(copy(ONE, tmp_path / "model"), "linear")
    edit_json(folder / "tokenizer_config.json", lambda it: it.update(model_max_length=64))
    with gptq.load(folder) as model:
        assert model.context == 64
    with gptq.load(folder, context=200) as model:
        assert model.context == 200


def test_a_context_that_is_no_size_is_not_known(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "model")
    edit_json(folder / "config.json", lambda it: it.update(max_position_embeddings=-1))
    with gptq.load(folder) as model:
        assert model.context == 2048
    assert off_by(folder, ONE) < 1e-6


def stretch(folder: Path, kind: str) -> Path:
    """Make a checkpoint one of 64 tokens that is stretched by four."""
    rope: dict[str, Any] = {"type": kind, "factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64

    def edit(config: dict[str, Any]) -> None:
        config.pop("rope_parameters", None)
        config.update(max_position_embeddings=64, rope_theta=10000.0, rope_scaling=rope)

    edit_json(folder / "config.json", edit)
    edit_json(folder / "tokenizer_config.json", lambda it: it.pop("model_max_length", None))
    return folder


def max_tokens(count: int) -> gptq.GenerateOptions:
    return gptq.GenerateOptions(max_new_tokens=count, temperature=0)
