"""Whether a checkpoint is right: planted faults are named, and good ones are not accused."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, ONE, copy, edit_tensors
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.hub import download
from gptq_loader_plugin.hub.hub_reference import HubReference
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.verify.damage import check_siblings
from gptq_loader_plugin.verify.files import check_hashes, check_index
from gptq_loader_plugin.verify.layers import _Measured, _of_groups, check_layers
from gptq_loader_plugin.verify.run import verify
from gptq_loader_plugin.verify.text import _of_reply, _of_score, is_trained

if TYPE_CHECKING:
    from pathlib import Path

    from hub_server import HubServer

    from gptq_loader_plugin.verify.report import Report

sys.path.insert(0, str(DATA.parents[2] / "bench"))
from planted_faults import FAULTS, looked_at, plant
from published import publish

NAMES = sorted(it.name for it in DATA.iterdir() if (it / "quantize_config.json").is_file())
SOURCES = ("gptq-4bit-64g-act-sym", "gptq_v2-3bit-64g-act-asym")
KINDS = [kind for kind, fault in FAULTS.items() if not fault.trained]


def verified(folder: Path) -> Report:
    options, plugins = LoadOptions(device="cpu"), gptq.Plugins(installed=True)
    return verify(str(folder), options=options, plugins=plugins)


@pytest.mark.parametrize("name", NAMES)
def test_a_good_checkpoint_is_not_accused(name: str) -> None:
    report = verified(DATA / name)
    assert report.right, report.line
    assert report.facts["layers"] == 14
    assert not report.facts["trained"], "the tests' model was made at random"


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "qwen2_moe"])
def test_a_good_checkpoint_of_another_family_is_not_accused(
    model_type: str, tmp_path: Path
) -> None:
    published = publish(model_type, tmp_path)
    report = verified(published.packed)
    assert report.right, report.line


@pytest.mark.parametrize("kind", KINDS)
def test_the_cause_of_a_planted_fault_is_named(kind: str, tmp_path: Path) -> None:
    source = SOURCES[KINDS.index(kind) % 2]
    fault = plant(DATA / source, tmp_path / "planted", kind, seed=3)
    first = looked_at(tmp_path / "planted", fault.symptom)[0]
    assert re.search(fault.cause, first.cause), first
    assert first.evidence
    assert first.fix


@pytest.mark.parametrize("kind", ["random codes", "zeros labelled otherwise", "no g_idx"])
def test_a_checkpoint_with_a_fault_is_wrong(kind: str, tmp_path: Path) -> None:
    plant(DATA / SOURCES[0], tmp_path / "planted", kind, seed=4)
    report = verified(tmp_path / "planted")
    assert not report.right
    assert "; ".join(it.fix for it in report.findings if it.wrong)


def test_layers_of_other_blocks_have_another_order(tmp_path: Path) -> None:
    rows = {
        f"model.layers.{block}.mlp.{name}": torch.randperm(256, generator=_seeded(block)).numpy()
        for block in range(5)
        for name in ("gate_proj", "up_proj")
    }
    assert list(check_siblings(rows)) == []
    first, second = "model.layers.1.mlp.up_proj", "model.layers.3.mlp.up_proj"
    rows[first], rows[second] = rows[second], rows[first]
    found = list(check_siblings(rows))
    assert [it.where for it in found] == [
        "model.layers.1.mlp.gate_proj",
        "model.layers.3.mlp.gate_proj",
    ]
    assert "layers were swapped" in found[0].message


def test_one_layers_zeros_stored_in_the_other_format(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "one")

    def shift(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.qzeros"] += 0x11111111

    edit_tensors(folder, shift)
    wrong = [it for it in check_layers(open_checkpoint(folder))[0] if it.wrong]
    assert [it.where for it in wrong] == ["model.layers.1.mlp.up_proj"]
    assert "off by one step (+1)" in wrong[0].message


def test_hashes_that_a_downloader_noted(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "one")
    right = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    note = folder / "huggingface-metadata.txt"
    note.write_text(f"url: https://huggingface.co/x\nsha256sum:\n    {right} model.safetensors\n")
    assert check_hashes(open_checkpoint(folder)) == ([], 1)
    note.write_text(f"sha256sum:\n    {'0' * 64} model.safetensors\n")
    assert "its hash differs" in check_hashes(open_checkpoint(folder))[0][0].message
    note.unlink()
    beside = folder / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    beside.parent.mkdir(parents=True)
    beside.write_text(f"{'c' * 40}\n{right}\n1700000000.0\n")
    assert check_hashes(open_checkpoint(folder)) == ([], 1)


def test_an_index_whose_tensors_are_in_no_file(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "one")
    names = dict.fromkeys(["model.norm.weight", "model.layers.9.norm"], "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = check_index(open_checkpoint(folder))
    assert found[0].wrong
    assert "model.layers.9.norm, and 1 such tensors are in no file" in found[0].message


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_codes_that_are_random_everywhere_are_a_note(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "one")
    generator = torch.Generator().manual_seed(0)

    def fill(tensors: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if name.endswith(".qweight"):
                tensor.random_(-(1 << 31), (1 << 31) - 1, generator=generator)

    edit_tensors(folder, fill)
    findings, _ = check_layers(open_checkpoint(folder))
    assert [finding.wrong for finding in findings] == [False]
    assert "no real weights" in findings[0].message


def test_two_bits_of_a_good_scale_are_not_random(tmp_path: Path) -> None:
    """The four codes of a bell-shaped weight are nearly as frequent; random ones are told apart."""
    folder = copy("gptq-2bit-32g-act-asym", tmp_path / "one")
    name, seeded = "model.layers.0.self_attn.k_proj", torch.Generator().manual_seed(0)
    entropy = 0.0

    def fill(tensors: dict[str, Any]) -> None:
        nonlocal entropy
        words = tensors[f"{name}.qweight"]
        weight = torch.randn(16, *words.shape, generator=seeded)
        codes = (weight / 0.8 + 1.5).round().clamp(0, 3).long()
        shares = codes.flatten().bincount() / codes.numel()
        entropy = float(-(shares * shares.log2()).sum())
        packed = sum(codes[i] << 2 * i for i in range(16))
        tensors[f"{name}.qweight"] = packed.to(torch.int32)

    edit_tensors(folder, fill)
    findings, _ = check_layers(open_checkpoint(folder))
    assert 1.97 < entropy < 1.99
    assert findings == []


def test_few_groups_may_miss_an_outermost_code_by_chance() -> None:
    """As one expert of 128 groups did that is right; so many of 1,152 are rows of other groups."""

    def measured(name: str, reached: float, groups: int) -> _Measured:
        return _Measured(
            name=name, bits=4, magnitude=1.0, entropy=3.7, zero_columns=0.0, reached=reached,
            groups=groups,
        )  # fmt: skip

    for groups, share, wrong in ((128, 0.953, 0), (1152, 0.953, 1), (128, 0.9, 1)):
        others = [measured(f"layers.{i}.up_proj", 1.0, groups) for i in range(4)]
        found = list(_of_groups([*others, measured("layers.4.up_proj", share, groups)]))
        assert [it.where for it in found] == ["layers.4.up_proj"] * wrong


def test_half_a_layers_columns_without_codes(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "one")

    def blank(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.up_proj.qweight"][:, ::2] = 0

    edit_tensors(folder, blank)
    findings, _ = check_layers(open_checkpoint(folder))
    assert [finding.where for finding in findings if finding.wrong] == [
        "model.layers.0.mlp.up_proj"
    ]


def test_a_file_of_the_hubs_cache_is_hashed(hub: HubServer) -> None:
    hub.add("owner/tiny-GPTQ", DATA / ONE)
    folder = download(HubReference("owner/tiny-GPTQ"))
    checkpoint = open_checkpoint(folder)
    assert check_hashes(checkpoint) == ([], 1)
    file = (folder / "model.safetensors").resolve()
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(changed)
    findings, _ = check_hashes(checkpoint)
    assert "its hash differs" in findings[0].message


def test_replies_are_judged_by_their_form() -> None:
    good = "Paris is the capital of France, and has been for a long time."
    assert not _of_reply(good, range(20), wrong=True)
    same = _of_reply("!!!!", [0] * 20, wrong=False)
    assert same[0].wrong
    assert "one token in 100%" in same[0].message
    loop = _of_reply("again and again", [1, 2, 3] * 10, wrong=False)
    assert not loop[0].wrong, "alone it is a note: small models loop too"
    assert "repeats itself" in loop[0].message
    mixed = _of_reply("word слово 言葉", range(20), wrong=True)
    assert mixed[0].wrong
    assert "mixes scripts: CJK, CYRILLIC, LATIN" in mixed[0].message


def test_scores_are_judged() -> None:
    assert not _of_score(40.0)
    assert not _of_score(400.0)[0].wrong
    assert _of_score(5000.0)[0].wrong
    assert _of_score(float("nan"))[0].wrong


def test_embeddings_that_share_a_direction_are_trained() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(1000, 64)

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return self.embedding

    torch.manual_seed(0)
    model = Model()
    assert not is_trained(model)
    with torch.no_grad():
        model.embedding.weight += 0.3
    assert is_trained(model)


def test_the_command_ends_with_the_verdict(tmp_path: Path) -> None:
    run = CliRunner().invoke
    good = run(app, ["verify", str(DATA / ONE), "--device", "cpu"])
    assert good.exit_code == 0, good.output
    assert good.stdout.splitlines()[0].startswith(f"{DATA / ONE}: right")
    plant(DATA / ONE, tmp_path / "planted", "codes of zero", seed=0)
    wrong = run(app, ["verify", str(tmp_path / "planted"), "--json"])
    assert wrong.exit_code == 1
    data = json.loads(wrong.stdout)
    assert data["right"] is False
    assert data["findings"][0]["check"] == "layers"
    shown = run(app, ["verify", str(tmp_path / "planted")])
    assert "wrong: layers: " in shown.stdout
    dense = run(app, ["verify", str(DATA / "base")])
    assert "the model is not quantised" in dense.stderr
