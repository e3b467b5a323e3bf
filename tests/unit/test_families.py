"""Repositories of 2023 and 2024 whose model type transformers does not know: they answer right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from altered import error
from family_checkpoints import IDS, edit_config, logits_error, publish
from family_configs import GROUPS, HEADS, KNOWN, LAYERS, REPOSITORIES, SIZE
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.architectures.families import FAMILIES
from gptq_loader_plugin.checkpoint.architectures.translate import translate
from gptq_loader_plugin.checkpoint.architectures.unsupported import REFUSED
from gptq_loader_plugin.checkpoint.reader import Checkpoint, GPTQReader
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.loading import load_model


@pytest.mark.parametrize("name", sorted(REPOSITORIES | KNOWN))
def test_it_answers_as_the_class_that_computes_the_same(name: str, tmp_path: Path) -> None:
    model = publish((REPOSITORIES | KNOWN)[name], tmp_path)
    if name == "baichuan 2":  # its head's rows have length one
        head = model.lm_head.weight
        head.data = head.data / head.data.norm(dim=1, keepdim=True)
    loaded = load_model(tmp_path, LoadOptions(backend="reference", device="cpu"))
    with torch.inference_mode():
        found, expected = loaded.model(IDS).logits, model(IDS).logits
    assert type(loaded.model) is type(model)
    assert not loaded.warnings
    noted = [it for it in loaded.notes if "its own code" in it]
    assert len(noted) == (name in REPOSITORIES)
    assert error(found, expected) < 1e-5
    assert float(expected.norm()) > 0.5  # a model that answers nothing agrees with anything


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_zeros_of_every_width_are_cut(bits: int, tmp_path: Path) -> None:
    assert logits_error(tmp_path, publish(REPOSITORIES["qwen"], tmp_path, bits=bits)) < 1e-5


def test_a_pickle_is_cut_too(tmp_path: Path) -> None:
    model = publish(REPOSITORIES["internlm2"], tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "model.pt")
    (tmp_path / "model.safetensors").unlink()
    assert logits_error(tmp_path, model) < 1e-5


@pytest.mark.parametrize("name", ["Yi", "internlm2", "llama of SuperHOT", "qwen"])
def test_transformers_loads_and_saves_it(name: str, tmp_path: Path) -> None:
    from gptq_loader_extensions import transformers as host

    model = publish(REPOSITORIES[name], tmp_path)
    plugins = gptq.Plugins(host)
    gptq.enable_transformers(plugins=plugins)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, trust_remote_code=True
        )
        loaded.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    finally:
        gptq.disable_transformers(plugins=plugins)
    with torch.inference_mode():
        expected = model(IDS).logits
        for found in (loaded(IDS).logits, again(IDS).logits):
            assert error(found, expected) < 1e-4


def test_the_plan_has_the_layers_that_are_run(tmp_path: Path) -> None:
    """A fused layer is planned, and shown, as the three it is cut into."""
    publish(REPOSITORIES["internlm2"], tmp_path)
    plan = gptq.explain(tmp_path, device="cpu")
    shapes = {it.layer.name: it.layer.out_features for it in plan.choices}
    assert len(shapes) == 7 * LAYERS
    assert shapes["model.layers.1.self_attn.q_proj"] == HEADS * SIZE
    assert shapes["model.layers.1.self_attn.v_proj"] == GROUPS * SIZE
    assert plan.kv_bytes_per_token is not None
    report = gptq.inspect(tmp_path)
    assert (report.model_type, report.quantized_layers) == ("internlm2", 5 * LAYERS)


def test_the_chosen_kernels_answer_closely_and_on_several_devices(tmp_path: Path) -> None:
    model = publish(REPOSITORIES["qwen"], tmp_path)
    options = {"device_map": "auto", "max_memory": {"cpu": "125kB", "disk": ""}}
    with torch.inference_mode():
        expected = model(IDS).logits
        with gptq.load(tmp_path, device="cpu") as loaded:
            assert "reference" not in loaded.plan.kernels()
            found = loaded.model(IDS).logits.float()
        assert error(found, expected) < 6e-2
        with gptq.load(tmp_path, offload_folder=tmp_path / "disk", **options) as loaded:
            assert {it.name for it in loaded.plan.placed.values()} == {"cpu", "disk"}
            found = loaded.model(IDS).logits.float()
        assert error(found, expected) < 6e-2


def test_a_context_ends_where_the_mathematics_would_differ(tmp_path: Path) -> None:
    """Qwen stretches its positions past `seq_length`, which transformers' class does not."""
    publish(REPOSITORIES["qwen"], tmp_path)
    with gptq.load(tmp_path, backend="reference", device="cpu") as loaded:
        assert loaded.context == 128


def test_other_parts_of_a_model_are_named_in_one_warning(tmp_path: Path) -> None:
    publish(REPOSITORIES["llava"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tower = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    save_file({**tensors, tower: torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    with gptq.load(tmp_path, backend="reference", device="cpu") as loaded:
        assert len(loaded.warnings) == 1
        assert "vision_tower" in loaded.warnings[0]


@pytest.mark.parametrize(
    ("name", "buffer", "length"),
    [("qwen", "rotary_emb.inv_freq", SIZE // 2), ("chatglm", "rotary_pos_emb.inv_freq", SIZE // 4)],
)
def test_computed_buffers_are_not_taken_from_a_file(
    name: str, buffer: str, length: int, tmp_path: Path
) -> None:
    """Repositories of Qwen and ChatGLM have the rotation's frequencies, in half precision."""
    model = publish(REPOSITORIES[name], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[f"transformer.{buffer}"] = torch.ones(length).half()
    save_file(tensors, tmp_path / "model.safetensors")
    assert logits_error(tmp_path, model) < 1e-5


def test_a_plugins_reader_may_know_another_family(tmp_path: Path) -> None:
    repository = REPOSITORIES["Yi"]
    model = publish(repository, tmp_path)
    edit_config(tmp_path, model_type="mine")
    mine = replace(next(it for it in FAMILIES if it.model_type == "Yi"), model_type="mine")

    class MyReader:
        name = "mine"

        def open(self, path: Path) -> Checkpoint | None:
            return translate(GPTQReader().open(path), families=(mine,))

    class Plugin:
        @gptq.hookimpl
        def gptq_readers(self) -> list[MyReader]:
            return [MyReader()]

    plugins = gptq.Plugins(Plugin(), installed=True)
    loaded = load_model(tmp_path, LoadOptions(backend="reference", device="cpu"), plugins=plugins)
    with torch.inference_mode():
        found, expected = loaded.model(IDS).logits, model(IDS).logits
    assert error(found, expected) < 1e-5


def test_transformers_is_left_what_is_not_quantised(tmp_path: Path) -> None:
    """A Qwen in float16 is transformers' own affair, with its own code or without."""
    from gptq_loader_extensions.transformers.detect import find_checkpoint

    publish(REPOSITORIES["qwen"], tmp_path)
    edit_config(tmp_path, seq_length=...)
    with pytest.raises(gptq.ConfigInvalid, match="seq_length"):
        find_checkpoint(tmp_path, {})
    (tmp_path / "quantize_config.json").unlink()
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert find_checkpoint(tmp_path, {}) is None


def test_code_that_is_passed_over_is_told_of(tmp_path: Path) -> None:
    publish(REPOSITORIES["xverse"], tmp_path)
    edit_config(tmp_path, model_type="llama", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (tmp_path / "modeling_own.py").write_text("raise SystemExit\n")
    with gptq.load(tmp_path, backend="reference", device="cpu") as loaded:
        assert len(loaded.warnings) == 1
        assert "modeling_own.Own" in loaded.warnings[0]


def test_every_family_has_a_case() -> None:
    assert {it.model_type for it in FAMILIES} == {
        it.stored["model_type"] for it in REPOSITORIES.values()
    }


def test_the_page_names_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text("utf-8")
    rows = [row.split("|")[2] for row in page.splitlines() if row.startswith("| ")]
    named = {it.strip() for row in rows for it in row.replace("`", "").split(",")}
    assert {it.model_type for it in (*FAMILIES, *REFUSED)} - {"llama"} <= named
