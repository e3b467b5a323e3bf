"""A checkpoint beside the model it was made of, over two places, and in a batch."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, copy, edit_tensors, plugins
from safetensors.torch import load_file
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.measure.perplexity import sample_text
from gptq_loader_plugin.verify import equal
from gptq_loader_plugin.verify.equal import check_batch, check_split, first_logits, split_map
from gptq_loader_plugin.verify.rescoring import diagnose_scores, diagnose_tokens, try_without
from gptq_loader_plugin.verify.run import verify

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptq_loader_plugin.generation.loaded import LoadedModel

SOURCE = "gptq-4bit-128g-noact-sym"
CPU = LoadOptions(device="cpu")


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    with gptq.load(DATA / SOURCE, device="cpu", plugins=plugins()) as loaded:
        yield loaded


def test_errors_are_those_of_the_weights() -> None:
    report = verify(str(DATA / SOURCE), options=CPU, plugins=plugins(), against=DATA / "base")
    assert report.right, report.line
    facts = report.facts["reference"]
    layers = {layer["name"]: layer for layer in facts["layers"]}
    assert len(layers) == 14
    name = "model.layers.1.mlp.up_proj"
    right = load_file(DATA / "base" / "model.safetensors")[f"{name}.weight"].float()
    with gptq.load(DATA / SOURCE, device="cpu", dtype="float32", backend="reference") as loaded:
        module = loaded.model.get_submodule(name)
        with torch.inference_mode():
            weight = module(torch.eye(right.shape[1])).t()
    error = float((weight - right).norm() / right.norm())
    assert math.isclose(layers[name]["weight"], error, rel_tol=1e-3)
    assert 0.05 < layers[name]["output"] < 0.5
    assert 0 < facts["kl_noise_floor"] < facts["kl_median"] < facts["kl_p90"] < facts["kl_max"]
    assert 0.5 < facts["top1_agreement"] < 1
    assert facts["tokens"] == 8 * 128
    assert facts["not_compared"] == []


def test_layers_that_were_swapped_are_named(tmp_path: Path) -> None:
    folder = copy(SOURCE, tmp_path / "one")
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"

    def swap(tensors: dict[str, Any]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            one, other = f"{first}.{part}", f"{second}.{part}"
            tensors[one], tensors[other] = tensors[other], tensors[one]

    edit_tensors(folder, swap)
    run = CliRunner().invoke(
        app, ["verify", str(folder), "--device", "cpu", "--reference", str(DATA / "base"), "--json"]
    )
    assert run.exit_code == 1, run.output
    wrong = [it for it in json.loads(run.stdout)["findings"] if it["wrong"]]
    assert [it["message"] for it in wrong] == [
        f"{first} is the reference's {second}: layers were swapped",
        f"{second} is the reference's {first}: layers were swapped",
    ]


def test_a_reference_that_is_not_there_is_refused() -> None:
    run = CliRunner().invoke(app, ["verify", str(DATA / SOURCE), "--reference", "/nowhere"])
    assert run.exit_code != 0
    assert "there is no /nowhere" in run.stderr


def test_two_places_answer_as_one(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [choice.layer.name for choice in model.plan.choices]
    assert split_map(names, "cpu", "disk") == {"": "cpu", "model.layers.1": "disk"}
    assert split_map(names[:1], "cpu", "disk") is None
    ids = model.tokenizer(sample_text())["input_ids"][:16]
    whole = first_logits(model, ids)
    assert check_split(DATA / SOURCE, names, ids, whole, CPU, plugins()) == []
    monkeypatch.setattr(equal, "TOLERANCE", 0.2)
    other = check_split(DATA / SOURCE, names, ids, whole * 2, CPU, plugins())
    assert "its logits differ by 50.0%" in other[0].message


def test_replies_in_a_batch_are_those_alone(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[5, 6, 7], [8, 9, 10, 11], [12, 13]]
    assert check_batch(model, prompts) == []
    begin = model.begin

    def begun(ids: list[int], *rest: Any, **more: Any) -> Any:
        alone = "stop" in more  # by stream_ids
        return begin(ids if alone else [*ids, 3, 4], *rest, **more)

    monkeypatch.setattr(model, "begin", begun)
    found = check_batch(model, prompts)
    assert found[0].wrong
    assert "is another in a batch than alone" in found[0].message


def test_a_part_that_is_better_left_out_is_named(model: LoadedModel) -> None:
    head = model.model.get_submodule("lm_head")
    towards = 100 * head.weight.detach()[380]  # a token that no text has
    part = model.model.get_submodule("model.layers.1.mlp")
    handle = part.register_forward_hook(lambda _module, _inputs, output: output + towards)
    try:
        gain = try_without(model, lambda _: None)
        named = list(diagnose_scores(model, lambda _: None))
    finally:
        handle.remove()
    assert gain is not None
    assert gain.nats > 1
    assert named == [gain.diagnosis], "what explains most, whatever else is a little better"
    assert "the layers of model.layers.1.mlp are not the ones" in named[0].cause


def test_a_part_that_seems_of_no_use_by_chance_is_not_named(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens are scored better without a part, and all of the text is not."""
    from gptq_loader_plugin.verify import rescoring

    whole = rescoring._score

    def by_chance(model: LoadedModel, windows: torch.Tensor) -> float:
        few = len(windows) == rescoring.WINDOWS and windows.shape[1] == rescoring.WINDOW
        lucky = few and bool(model.model.get_submodule("model.layers.0.mlp")._forward_hooks)
        return whole(model, windows) - lucky

    monkeypatch.setattr(rescoring, "_score", by_chance)
    assert try_without(model, lambda _: None) is None


def test_a_tokenizer_whose_ids_are_other_rows(model: LoadedModel) -> None:
    assert list(diagnose_tokens(model)) == [], "too few words to judge by"
    words = [f"{a}{b}{c}" for a in "bcdfgh" for b in "aeiou" for c in "klmnprstvwxyz"]
    vocabulary = {word: i for i, word in enumerate([*words, *(it.capitalize() for it in words)])}
    vocabulary |= {f"\u0120{word}": len(vocabulary) + i for i, word in enumerate(words)}
    meaning = torch.randn(len(words), 32, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([meaning, meaning, meaning])

    embedding = torch.nn.Embedding.from_pretrained(rows)
    known: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(get_vocab=lambda: vocabulary),
        model=SimpleNamespace(get_input_embeddings=lambda: embedding),
    )
    assert list(diagnose_tokens(known)) == []
    others = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    embedding.weight = torch.nn.Parameter(rows[others], requires_grad=False)
    assert "of another model" in next(diagnose_tokens(known)).cause
