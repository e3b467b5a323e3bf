"""What goes wrong on a machine, and the causes of symptoms, each from a real one made here."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import PathDistribution
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from altered import DATA, ONE, copy, edit_json, edit_tensors
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.verify import machine
from gptq_loader_plugin.verify.machine import diagnose_machine
from gptq_loader_plugin.verify.symptoms import diagnose

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.verify.report import Diagnosis, Symptom

sys.path.insert(0, str(DATA.parents[2] / "bench"))
from planted_faults import plant


def causes(diagnoses: list[Diagnosis]) -> str:
    assert all(it.cause and it.evidence and it.fix for it in diagnoses)
    return "\n".join(it.cause for it in diagnoses)


def symptom(folder: Path, name: Symptom) -> list[Diagnosis]:
    options, plugins = LoadOptions(device="cpu"), gptq.Plugins(installed=True)
    return diagnose(str(folder), name, options=options, plugins=plugins)


def test_files_that_a_shell_made_of_a_version(tmp_path: Path) -> None:
    assert "quoted" not in causes(diagnose_machine(folder=tmp_path, environ={}))
    (tmp_path / "=4.32.0").touch()
    stray = diagnose_machine(folder=tmp_path, environ={})[0]
    assert "not quoted" in stray.cause
    assert "transformers>=4.32.0" in stray.fix


def test_variables_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "cpu.max"
    limit.write_text("50000 100000\n")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(machine, "total_memory", lambda: psutil.virtual_memory().total // 2)
    seen = diagnose_machine(
        folder=tmp_path, environ={"HF_ENDPOINT": "http://mirror"}, cpu_max=limit
    )
    words = causes(seen)
    assert "more threads than there are processors" in words
    assert "a part of the machine's memory alone" in words
    assert "another hub" in words
    assert any("OMP_NUM_THREADS=1" in it.fix for it in seen)


def test_packages_that_do_not_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "site" / "optimum-2.3.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: optimum\nVersion: 2.3.0\nRequires-Dist: torch<1.0\n"
    )
    assert PathDistribution(info).requires == ["torch<1.0"]
    monkeypatch.syspath_prepend(tmp_path / "site")
    clash = [
        it
        for it in diagnose_machine(folder=tmp_path, environ={})
        if it.cause == "optimum and torch do not go together"
    ]
    assert "optimum needs torch<1.0" in clash[0].evidence


def test_a_wheel_for_another_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, number in (("exllamav2", "0.3.2+cu128.torch2.8.0"), ("auto_gptq", "0.7.1")):
        info = tmp_path / "site" / f"{name}-{number}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {number}\n"
        )
    monkeypatch.syspath_prepend(tmp_path / "site")
    seen = diagnose_machine(folder=tmp_path, environ={})
    words = causes(seen)
    assert "exllamav2 was built for another torch" in words
    assert "AutoGPTQ is installed" in words
    assert all(it.about == "machine" for it in seen)


@pytest.mark.skipif(sys.platform == "win32", reason="the programs are shell scripts")
def test_a_driver_and_a_compiler_of_other_releases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def install(name: str, answer: str) -> None:
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    install("nvidia-smi", "| NVIDIA-SMI 535.1  Driver Version: 535.1  CUDA Version: 12.2 |")
    install("nvcc", "Cuda compilation tools, release 12.4, V12.4.99")
    words = causes(diagnose_machine(folder=tmp_path, environ={}))
    assert "the driver is older than torch's CUDA" in words
    assert "the CUDA compiler is of another release than torch's" in words
    install("nvidia-smi", "NVIDIA-SMI has failed")
    assert "driver does not answer" in causes(diagnose_machine(folder=tmp_path, environ={}))


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "DISK_FREE", 1 << 60)
    seen = [it for it in diagnose_machine(folder=tmp_path, environ={}) if "full" in it.cause]
    assert "is free in" in seen[0].evidence


def test_a_context_beyond_the_models_is_what_is_wrong() -> None:
    options, plugins = LoadOptions(device="cpu", context=4096), gptq.Plugins(installed=True)
    seen = diagnose(str(DATA / ONE), "crash", options=options, plugins=plugins)
    assert "the context is too long for this model" in seen[0].cause
    assert seen[0].about == "options"


def test_the_cause_of_gibberish_is_the_fault(tmp_path: Path) -> None:
    plant(DATA / ONE, tmp_path / "planted", "random codes", seed=1)
    assert "codes that are random" in symptom(tmp_path / "planted", "gibberish")[0].cause
    plant(DATA / ONE, tmp_path / "label", "zeros labelled otherwise", seed=1)
    assert "off by one step" in symptom(tmp_path / "label", "gibberish")[0].cause
    assert symptom(DATA / ONE, "gibberish") == []


def test_a_web_page_in_place_of_weights(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "one")
    (folder / "model.safetensors").write_text("<!DOCTYPE html><html>Sign in</html>")
    assert "this is a web page" in symptom(folder, "crash")[0].cause


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("model.embed_tokens.weight", slice(300, None), "is zero in 22% of its rows"),
        ("model.layers.1.input_layernorm.weight", slice(64, None), "in 50% of its channels"),
        ("model.layers.0.mlp.up_proj.scales", slice(2, None), "scales of which 50% are zero"),
        ("model.layers.0.mlp.up_proj.qzeros", slice(None), "zero points that are all 1"),
    ],
)
def test_a_tensor_of_which_a_part_is_not_there(
    name: str, rows: slice, words: str, tmp_path: Path
) -> None:
    folder = copy(ONE, tmp_path / "one")
    edit_tensors(folder, lambda tensors: tensors[name][rows].zero_())
    assert words in symptom(folder, "gibberish")[0].cause


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rms_norm_eps", 1.0, "rms_norm_eps is 1, which no model has"),
        ("rope_theta", 1e6, "two bases of the rotary embedding"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1.0}, "which no model has"),
        ("max_position_embeddings", 1 << 17, "the context is too long"),
    ],
)
def test_a_number_of_the_config_that_no_model_has(
    field: str, value: object, words: str, tmp_path: Path
) -> None:
    folder = copy(ONE, tmp_path / "one")
    edit_json(folder / "config.json", lambda it: it.update({field: value}))
    assert words in symptom(folder, "gibberish")[0].cause


def test_the_cause_of_nan_is_the_tensor(tmp_path: Path) -> None:
    plant(DATA / ONE, tmp_path / "planted", "a norm that is not finite", seed=1)
    assert "not finite" in symptom(tmp_path / "planted", "nan")[0].cause


def test_the_cause_of_a_crash_is_the_file(tmp_path: Path) -> None:
    plant(DATA / ONE, tmp_path / "planted", "a tensor that is missing", seed=1)
    assert "is missing" in symptom(tmp_path / "planted", "crash")[0].cause


def test_a_reply_that_never_stops_has_no_end_token(tmp_path: Path) -> None:
    assert symptom(DATA / ONE, "never-stops") == []
    folder = copy(ONE, tmp_path / "one")
    edit_json(folder / "tokenizer_config.json", lambda it: it.update(eos_token="<|endoftext|>"))
    seen = symptom(folder, "never-stops")
    assert "and a turn ends with <|im_end|>" in causes(seen)


def test_a_slow_model_has_a_slow_kernel_or_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    options = LoadOptions(device="cpu", backend="reference")
    plugins = gptq.Plugins(installed=True)
    seen = diagnose(str(DATA / ONE), "slow", options=options, plugins=plugins)
    assert "layers run on a slow kernel: reference" in causes(seen)
    monkeypatch.setattr("gptq_loader_plugin.verify.symptoms.free_memory", lambda: 1000)
    assert "does not fit into memory" in causes(symptom(DATA / ONE, "slow"))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke
    monkeypatch.chdir(tmp_path)
    (tmp_path / "=1.0").touch()
    shown = run(app, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert "not quoted" in shown.stdout
    assert json.loads(run(app, ["doctor", "--json"]).stdout)[0]["fix"].startswith("delete them")
    nothing = run(app, ["doctor", str(DATA / ONE), "--symptom", "never-stops"])
    assert "nothing was found that explains it" in nothing.stdout
    refused = run(app, ["doctor", str(DATA / ONE)])
    assert "a symptom belongs to a checkpoint" in refused.stderr
