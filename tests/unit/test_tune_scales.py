"""All scales of a model tuned together, towards what the unquantised model answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, error, plugins
from family_checkpoints import edit_config
from published import publish
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.reader import GPTQReader
from gptq_loader_plugin.generation.kl_divergence import kl_divergence
from gptq_loader_plugin.quantize import QuantizeOptions, memory, quantize_model, tune_scales
from gptq_loader_plugin.quantize.calibration import built_in_text, calibration_samples
from gptq_loader_plugin.quantize.source import load_source

if TYPE_CHECKING:
    from pathlib import Path

BASE = DATA / "base"


def options(**fields: Any) -> QuantizeOptions:
    return QuantizeOptions(
        **{"bits": 2, "samples": 24, "seq_len": 64, "group_size": 32, "order": "none", **fields}
    )


def divergence(folder: Path, samples: list[list[int]]) -> float:
    """Compute how far a checkpoint is from the model it was made of, in nats a token."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ids = torch.tensor(samples)
    with gptq.load(folder, backend="reference", plugins=plugins()) as loaded, torch.no_grad():
        right, found = (it(ids).logits.float().log_softmax(-1) for it in (base, loaded.model))
    return float(kl_divergence(right, found).mean())


def test_they_come_nearer_and_nothing_else_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize_model(BASE, tmp_path / "tuned", options=options())
    monkeypatch.setattr(memory, "tuning_bytes", lambda _: 0)
    quantize_model(BASE, tmp_path / "alone", options=options())
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    others = options(offset=5000, samples=16)
    samples = calibration_samples(tokenizer, others, built_in_text(), context=512)
    assert divergence(tmp_path / "tuned", samples) < 0.99 * divergence(tmp_path / "alone", samples)
    tuned, alone = (load_file(tmp_path / it / "model.safetensors") for it in ("tuned", "alone"))
    assert tuned.keys() == alone.keys()
    changed = {name for name, tensor in tuned.items() if not torch.equal(tensor, alone[name])}
    assert changed == {name for name in tuned if name.endswith(".scales")}


def test_a_run_that_is_interrupted_meanwhile_goes_on(tmp_path: Path) -> None:
    told: list[gptq.Progress] = []
    quantize_model(BASE, tmp_path / "whole", options=options(), progress=told.append)
    steps = [it for it in told if it.stage == "tune scales"]
    assert [it.done for it in steps] == list(range(1, 25))
    assert all(it.total == 24 for it in steps)
    assert re.fullmatch(r"divergence \d\.\d{3} nats, (\d+ min )?\d+ s left", steps[0].detail)

    def stop(progress: gptq.Progress) -> None:
        if (progress.stage, progress.done) == ("tune scales", 13):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(BASE, tmp_path / "parts", options=options(), progress=stop)
    told.clear()
    quantize_model(BASE, tmp_path / "parts", options=options(), progress=told.append)
    assert [it.done for it in told if it.stage == "tune scales"] == list(range(9, 25))
    whole, parts = (tmp_path / it / "model.safetensors" for it in ("whole", "parts"))
    assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("gpt2", {}),  # transposed weights, and a tied head
        ("gemma2", {"final_logit_softcapping": 0.05}),  # logits that are bent after the head
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("mixtral", {}),
        ("phi3", {}),  # joined layers
    ],
)
def test_what_is_compared_are_the_models_own_answers(
    model_type: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(model_type, tmp_path / "published").original
    AutoTokenizer.from_pretrained(BASE).save_pretrained(source)
    edit_config(source, **fields)
    compared: list[torch.Tensor] = []

    def note(right: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        compared.extend((right.detach().clone(), found.detach().clone()))
        return kl_divergence(right, found)

    chosen = options(samples=1, seq_len=48)
    monkeypatch.setattr(tune_scales, "kl_divergence", note)
    quantize_model(source, tmp_path / "tuned", options=chosen)
    monkeypatch.setattr(memory, "tuning_bytes", lambda _: 0)
    quantize_model(source, tmp_path / "alone", options=chosen)
    model, tokenizer = load_source(source)
    ids = torch.tensor(calibration_samples(tokenizer, chosen, built_in_text(), context=48))
    with (
        gptq.load(tmp_path / "alone", backend="reference", plugins=plugins()) as loaded,
        torch.no_grad(),
    ):
        expected = [it(input_ids=ids).logits[0].float() for it in (model, loaded.model)]
    assert error(*(it.log_softmax(-1) for it in expected)) > 1e-4, "they are told apart"
    for found, logits in zip(compared, expected, strict=True):
        spread = logits - logits.mean(-1, keepdim=True)
        assert error(found - found.mean(-1, keepdim=True), spread) < 0.03  # bfloat16 products


def test_where_there_is_no_room_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(memory, "tuning_bytes", lambda _: 1 << 50)
    quantize_model(BASE, tmp_path / "out", options=options(), tell=told.append)
    assert any("not tuned together" in line and "it may take" in line for line in told)
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_model_that_has_no_way_back_is_quantised_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    model, tokenizer = load_source(BASE)

    class InPlace(torch.nn.Module):
        def __init__(self, own: torch.nn.Module) -> None:
            super().__init__()
            self.own = own

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.own(x)
            return made.mul_(made.sigmoid().mul_(2))  # changes what the way back needs

    for layer in model.model.layers:
        layer.mlp.act_fn = InPlace(layer.mlp.act_fn)
    monkeypatch.setattr(
        "gptq_loader_plugin.quantize.run.open_source", lambda *_, **__: (model, tokenizer, None)
    )
    quantize_model(BASE, tmp_path / "out", options=options(), tell=told.append)
    assert any("cannot be run backwards" in line for line in told), told
    # what it computes with then is what was written
    written = GPTQReader().open(tmp_path / "out")
    for name in written.layers:
        weight = written.packed(name).dequantize()
        assert torch.equal(model.get_submodule(name).weight, weight), name


def test_a_model_that_passes_its_output_embedding_by_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    model, tokenizer = load_source(BASE)
    own = model.forward

    def without_head(*arguments: Any, **keywords: Any) -> Any:
        hooks, model.lm_head._forward_pre_hooks = model.lm_head._forward_pre_hooks, {}
        try:
            return own(*arguments, **keywords)
        finally:
            model.lm_head._forward_pre_hooks = hooks

    monkeypatch.setattr(model, "forward", without_head)
    monkeypatch.setattr(
        "gptq_loader_plugin.quantize.run.open_source", lambda *_, **__: (model, tokenizer, None)
    )
    quantize_model(BASE, tmp_path / "out", options=options(), tell=told.append)
    assert any("does not call its output embedding" in line for line in told), told
    assert (tmp_path / "out" / "config.json").is_file()


def test_fast_effort_leaves_it_out(tmp_path: Path) -> None:
    told: list[gptq.Progress] = []
    for effort in ("fast", "standard"):
        told.clear()
        chosen = options(effort=effort, samples=2)
        quantize_model(BASE, tmp_path / effort, options=chosen, progress=told.append)
        stages = {it.stage for it in told} & {"read answers", "tune scales"}
        assert len(stages) == (2 if effort == "standard" else 0)
