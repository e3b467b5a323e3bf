"""Checkpoints compared with what they were made of: divergences as torch computes them."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import altered
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.measure.compare import compare_checkpoints
from gptq_loader_plugin.measure.comparison_page import comparison_page
from gptq_loader_plugin.measure.divergence import KeptReference
from gptq_loader_plugin.measure.perplexity import cut_windows, sample_text

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.measure.compare import Comparison

NAMES = ("gptq-4bit-32g-act-sym", "gptq-2bit-64g-noact-sym")
PATHS = [str(altered.DATA / name) for name in NAMES]
BASE = altered.DATA / "base"
CPU = LoadOptions(device="cpu", backend="reference")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare_checkpoints(
        PATHS, sample_text(), text_name="Sample", options=CPU, plugins=altered.plugins(),
        unquantized=BASE, windows=2, window_tokens=64, speed=False,
    )  # fmt: skip


def test_divergences_are_torchs(comparison: Comparison) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    assert [it.is_reference for it in comparison.models] == [True, False, False]
    for path, compared in zip(PATHS, comparison.models[1:], strict=True):
        with gptq.load(path, options=CPU, plugins=altered.plugins()) as model:
            windows = cut_windows(model, sample_text(), windows=2, window_tokens=64)
            with torch.inference_mode():
                own = torch.cat([model.model(it[None]).logits[0, :-1].float() for it in windows])
                right = torch.cat([base(it[None]).logits[0, :-1] for it in windows])
        every = torch.nn.functional.kl_div(
            own.log_softmax(-1), right.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        divergence = compared.divergence
        assert divergence is not None
        assert divergence.mean == pytest.approx(float(every.mean()), rel=1e-3)
        assert divergence.median == pytest.approx(float(every.quantile(0.5)), rel=1e-2)
        assert divergence.p90 == pytest.approx(float(every.quantile(0.9)), rel=1e-2)
        same = (own.argmax(-1) == right.argmax(-1)).float().mean()
        assert divergence.top1 == pytest.approx(float(same), abs=0.01)
        expected = torch.nn.functional.cross_entropy(own, torch.cat([it[1:] for it in windows]))
        assert compared.perplexity == pytest.approx(float(expected.exp()), rel=1e-4)


def test_the_noise_is_far_below_what_is_lost(comparison: Comparison) -> None:
    four, two = (it.divergence for it in comparison.models[1:])
    assert four is not None
    assert two is not None
    assert 0 < comparison.noise.mean < four.mean / 100
    assert four.mean < two.mean


@pytest.mark.skipif(os.name == "nt", reason="a file that is mapped has its name there")
def test_a_kill_leaves_no_probabilities_behind(tmp_path: Path) -> None:
    windows = [torch.tensor([1, 2, 3])]
    kept = KeptReference(tmp_path, windows, 4)
    assert not list(tmp_path.iterdir()), "the system frees what has no name with the process"
    logits = torch.eye(4)[:3]
    list(kept.read(lambda _: logits, keep=True))
    *_, scored = kept.read(lambda _: 2 * logits)
    divergence = torch.nn.functional.kl_div(
        (2 * logits[:2]).log_softmax(-1), logits[:2].log_softmax(-1), log_target=True,
        reduction="none",
    ).sum(-1)  # fmt: skip
    assert scored.divergence is not None
    assert scored.divergence.mean == pytest.approx(float(divergence.mean()), rel=1e-4)


def test_a_page_needs_nothing_else(comparison: Comparison) -> None:
    page = comparison_page(comparison, text_name="A <text>")
    assert "A &lt;text&gt;" in page
    assert page.count("<circle") == 2
    assert not any(it in page for it in ("<script", "http:", "https:", "src="))


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    folder = altered.copy(NAMES[0], tmp_path / "other")

    def swap(table: dict[str, dict[str, dict[str, int]]]) -> None:
        vocabulary = table["model"]["vocab"]
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]

    altered.edit_json(folder / "tokenizer.json", swap)
    with pytest.raises(OptionInvalid, match="other tokens"):
        compare_checkpoints(
            [PATHS[0], str(folder)], sample_text(), text_name="Sample", options=CPU,
            plugins=altered.plugins(), windows=1, window_tokens=32, speed=False,
        )  # fmt: skip


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQ_LOADER_DATA", str(tmp_path / "data"))
    page = tmp_path / "page.html"
    options = ["--windows", "1", "--window-tokens", "32", "--device", "cpu", "--no-check"]
    done = CliRunner().invoke(app, ["compare", *PATHS, *options, "--html", str(page), "--json"])
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert [it["bits"] for it in data["models"]] == [4, 2]
    assert data["models"][0]["is_reference"] is True
    assert all(it["reply_rate"] > 0 for it in data["models"])
    assert page.read_text().startswith("<!doctype html>")
    assert len(list((tmp_path / "data" / "perplexity").iterdir())) == 2
    alone = CliRunner().invoke(app, ["compare", PATHS[0]])
    assert alone.exit_code == 1
    assert "nothing to compare with" in alone.stderr
