"""What no transformers class computes, and what does not fit together, is refused in words."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from family_checkpoints import edit_config, publish
from family_configs import REPOSITORIES
from safetensors.torch import load_file, save_file

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.architectures.unsupported import REFUSED

if TYPE_CHECKING:
    from pathlib import Path


def test_zeros_that_share_a_word_are_refused(tmp_path: Path) -> None:
    """32 zeros of 3 bits lie in three words; a head here has 16."""
    publish(REPOSITORIES["internlm2"], tmp_path, bits=3)
    with pytest.raises(gptq.UnsupportedFormat, match="share words"):
        gptq.explain(tmp_path, device="cpu")


DIFFERENT = {
    "baichuan without its limit": ("baichuan", {"max_position_embeddings": ...}, "ALiBi"),
    "baichuan of 13B": ("baichuan", {"hidden_size": 5120}, "ALiBi"),
    "chatglm 1": ("chatglm", {"multi_query_attention": ...}, "first generation"),
    "chatglm, rotated otherwise": ("chatglm", {"original_rope": False}, "original_rope is false"),
    "minicpm of experts": ("minicpm", {"num_experts": 8}, "mixture of experts"),
    "orion with biases": ("orion", {"attention_bias": True}, "attention_bias is true"),
    "qwen, partly rotated": ("qwen", {"rotary_pct": 0.5}, "rotary_pct is 0.5"),
    "santacoder": (
        "xverse", {"model_type": "gpt2", "attention_head_type": "multiquery"}, "SantaCoder",
    ),
    **{
        f"mpt with {key}": ("xverse", {"model_type": "mpt", "attn_config": {key: value}}, "lacks")
        for key, value in (("alibi", False), ("qk_ln", True), ("attn_type", "multiquery_attention"))
    },
    **{it.model_type: ("xverse", {"model_type": it.model_type}, it.reason)
       for it in REFUSED if "Python code" in it.reason},
}  # fmt: skip


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose config.json a test writes."""
    folder = tmp_path_factory.mktemp("one")
    publish(REPOSITORIES["xverse"], folder)
    return folder


@pytest.mark.parametrize("name", sorted(DIFFERENT))
def test_what_no_class_computes_is_refused_in_words(
    name: str, one_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tensors are a tiny model's.
    monkeypatch.setattr("gptq_loader_plugin.checkpoint.protocol.check_sizes", lambda *_: None)
    repository, fields, words = DIFFERENT[name]
    (one_folder / "config.json").write_text(json.dumps(REPOSITORIES[repository].stored))
    edit_config(one_folder, **fields)
    for attempt in (gptq.load, gptq.explain):
        with pytest.raises(gptq.UnsupportedFormat, match=re.escape(words)) as refused:
            attempt(one_folder, device="cpu")
        assert "GGUF" in refused.value.hint
    assert gptq.inspect(one_folder).quantized_layers  # what is in it is told all the same


def test_a_config_that_lacks_what_it_takes_is_told_of(tmp_path: Path) -> None:
    publish(REPOSITORIES["qwen"], tmp_path)
    edit_config(tmp_path, seq_length=...)
    with pytest.raises(gptq.ConfigInvalid, match="seq_length"):
        gptq.load(tmp_path, device="cpu")
    edit_config(tmp_path, model_type="mistral3")
    with pytest.raises(gptq.ConfigInvalid, match="text_config"):
        gptq.load(tmp_path, device="cpu")


def test_heads_that_the_fused_layer_does_not_hold_are_told_of(tmp_path: Path) -> None:
    publish(REPOSITORIES["internlm2"], tmp_path)
    edit_config(tmp_path, num_key_value_heads=4)
    with pytest.raises(gptq.ConfigInvalid, match=r"wqkv.* not the heads that config\.json names"):
        gptq.load(tmp_path, device="cpu")


def test_a_quantised_head_that_must_be_normalised_is_refused(tmp_path: Path) -> None:
    publish(REPOSITORIES["baichuan 2"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(gptq.UnsupportedFormat, match=r"lm_head\.weight"):
        gptq.explain(tmp_path, device="cpu")


@pytest.mark.parametrize("model_type", ["llama", "xverse"])
def test_a_config_with_a_field_of_the_wrong_type_is_told_of(
    model_type: str, tmp_path: Path
) -> None:
    publish(REPOSITORIES["xverse"], tmp_path)
    edit_config(tmp_path, model_type=model_type, vocab_size="many")
    with pytest.raises(gptq.ConfigInvalid, match="vocab_size"):
        gptq.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("model_type", "words"), [("t5", "goes on with a text"), ("llamo", "has no llamo models")]
)
def test_a_model_that_goes_on_with_no_text_is_refused_in_words(
    model_type: str, words: str, tmp_path: Path
) -> None:
    publish(REPOSITORIES["xverse"], tmp_path)
    edit_config(tmp_path, model_type=model_type)
    with pytest.raises(gptq.UnsupportedFormat, match=words):
        gptq.load(tmp_path, device="cpu")
