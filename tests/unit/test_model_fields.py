"""config.json's fields as people, editors and converters write them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import ONE, copy, edit_json, error, expected, plugins

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy(ONE, tmp_path / "one")


def set_config(folder: Path, **fields: Any) -> None:
    edit_json(folder / "config.json", lambda it: it.update(fields))


MEANT: list[dict[str, Any]] = [
    {"torch_dtype": "auto"},
    {"dtype": "auto"},
    {"torch_dtype": "torch.float16"},
    {"dtype": 16},
    {"torch_dtype": "fp16"},
    {"eos_token_id": "381"},
    {"eos_token_id": ["381", 381.0]},
    {"eos_token_id": []},
    {"bos_token_id": 380.0},
    {"pad_token_id": -1},
    {"max_position_embeddings": 256.0},
    {"max_position_embeddings": "256"},
    {"max_position_embeddings": 0},
    {"max_position_embeddings": "-1"},
    {"num_hidden_layers": "2"},
    {"hidden_size": 128.0, "vocab_size": "384"},
    {"num_attention_heads": 4.0},
    {"use_cache": "true"},
    {"tie_word_embeddings": "false"},
    {"attention_bias": "False"},
]


@pytest.mark.parametrize("fields", MEANT, ids=str)
def test_what_is_meant_is_read(fields: dict[str, Any], folder: Path) -> None:
    set_config(folder, **fields)
    ids, right = expected(ONE)
    gptq.inspect(folder, plugins=plugins())
    assert gptq.explain(folder, device="cpu", plugins=plugins()).shape.layers == 2
    options: dict[str, Any] = {"backend": "reference", "plugins": plugins(), "check": False}
    with gptq.load(folder, device="cpu", **options) as model, torch.inference_mode():
        assert error(model.model(ids).logits, right) < 1e-5
        assert 381 in model.end_ids()


@pytest.mark.parametrize("ends", ["381", ["381", 380.0], 381.0])
def test_the_ends_of_generation_config_too(ends: Any, folder: Path) -> None:
    (folder / "generation_config.json").write_text("{}")
    edit_json(folder / "generation_config.json", lambda it: it.update(eos_token_id=ends))
    with gptq.load(folder, device="cpu", plugins=plugins()) as model:
        assert 381 in model.end_ids()
        assert all(isinstance(end, int) for end in model.end_ids())


IMPOSSIBLE: list[dict[str, Any]] = [
    {"head_dim": 0},
    {"num_attention_heads": 0},
    {"num_key_value_heads": 0},
    {"max_position_embeddings": "long"},
    {"max_position_embeddings": 512.5},
    {"hidden_size": -128},
    {"hidden_size": True},
    {"num_hidden_layers": 0},
    {"intermediate_size": 0},
    {"vocab_size": 0},
    {"vocab_size": 10**30},
    {"hidden_size": float("inf")},
    {"hidden_size": float("nan")},
    {"eos_token_id": "</s>"},
    {"eos_token_id": [1, "</s>"]},
    {"bos_token_id": True},
    {"pad_token_id": 1.5},
]


@pytest.mark.parametrize("fields", IMPOSSIBLE, ids=str)
def test_what_cannot_be_meant_is_an_error_that_names_the_field(
    fields: dict[str, Any], folder: Path
) -> None:
    set_config(folder, **fields)
    (name,) = fields
    for use in (gptq.inspect, gptq.explain, gptq.load):
        with pytest.raises(gptq.ConfigInvalid, match=rf"config\.json: {name} is ") as caught:
            use(folder, plugins=plugins())
        assert name in caught.value.hint
        assert "transformers" not in caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"num_attention_heads": 7},
        {"num_key_value_heads": 3},
        {"rope_parameters": "linear"},
        {"rope_parameters": {"rope_type": "linear", "factor": "four"}},
        {"rms_norm_eps": "small"},
        {"hidden_act": "no such function"},
        {"hidden_size": [1, 2]},
        {"layer_types": "all"},
        {"architectures": 1},
        {"head_dim": 1},
        {"rope_theta": "x"},
    ],
    ids=str,
)
def test_other_faults_are_told_as_the_checkpoints(fields: dict[str, Any], folder: Path) -> None:
    set_config(folder, **fields)
    try:
        gptq.load(folder, device="cpu", plugins=plugins()).close()
    except gptq.CheckpointError as fault:
        assert "update transformers" not in fault.hint  # noqa: PT017 - some are read as meant
