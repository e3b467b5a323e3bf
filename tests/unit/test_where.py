"""Which programs take a checkpoint: the rules, on checkpoints whose answers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from altered import ALL, DATA, ONE, copy, edit_json, edit_tensors, rename_weights, set_field
from safetensors.torch import load_file
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_extensions.vllm.planning.eligibility import refusal
from gptq_loader_plugin.catalog.engines.engine import Answer, engines_of
from gptq_loader_plugin.catalog.engines.facts import gather_facts
from gptq_loader_plugin.catalog.engines.judge import ask_engines
from gptq_loader_plugin.catalog.engines.table import ENGINES
from gptq_loader_plugin.catalog.where import find_where
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.device import Device
from gptq_loader_plugin.errors import CheckpointNotFound, HubError, UnsupportedFormat

if TYPE_CHECKING:
    from pathlib import Path

    from hub_server import HubServer

NAMES = sorted(it.name for it in DATA.iterdir() if (it / "quantize_config.json").is_file())
RUNS: dict[str, tuple[str, ...]] = {
    "gptq-4bit-noneg-act-sym": ("vllm", "sglang", "transformers", "gptqmodel", "exllamav2"),
    "gptq-4bit-64g-act-sym": ("sglang", "transformers", "gptqmodel", "exllamav2", "llama.cpp"),
    "gptq-3bit-noneg-act-sym": ("transformers", "gptqmodel"),
    "gptq-2bit-64g-noact-sym": ("vllm+humming", "transformers", "llama.cpp"),
    "gptq_p-5bit-32g-act-sym": ("gptqmodel",),
}


def asked(folder: Path) -> dict[str, Answer]:
    checkpoint = open_checkpoint(folder)
    return {it.engine: it for it in ask_engines(gather_facts(checkpoint))}


def test_every_rule_names_its_version_its_day_and_its_source() -> None:
    assert len({it.name for it in ENGINES}) == len(ENGINES)
    for engine in ENGINES:
        assert engine.version
        assert engine.date.startswith("20")
        assert engine.source
        assert engine.refusal or engine.bits, "it says what it takes, or why it takes nothing"


def test_what_a_config_says_of_its_writer_keeps_auto_round_away(tmp_path: Path) -> None:
    folder = copy("gptq-3bit-noneg-act-sym", tmp_path / "it")
    before = asked(folder)["auto-round"]
    assert before.takes is False
    assert "config.json has meta" in before.reason
    edit_json(folder / "config.json", lambda it: it["quantization_config"].pop("meta"))
    assert asked(folder)["auto-round"].takes


@pytest.mark.parametrize("name", RUNS)
def test_known_checkpoints_run_where_they_do(name: str) -> None:
    answers = asked(DATA / name)
    takers = {engine for engine, it in answers.items() if it.takes}
    assert set(RUNS[name]) <= takers
    assert takers.isdisjoint({"exllamav3", "mlx-lm", "ollama", "lm-studio", "ktransformers"})
    if name != "gptq-4bit-noneg-act-sym":
        assert answers["vllm"].takes is False


@pytest.mark.parametrize("name", NAMES)
def test_the_plug_in_for_vllm_decides_by_the_same_rules(name: str) -> None:
    checkpoint = open_checkpoint(DATA / name)
    answers = asked(DATA / name)
    layers = tuple(checkpoint.layers.values())
    for engine, device in (("vllm", None), ("vllm-cpu", Device("cpu"))):
        reason = refusal(checkpoint, layers, device)
        assert answers[engine].takes is (reason is None), (reason, answers[engine].reason)


def test_a_config_that_lies_is_not_believed(tmp_path: Path) -> None:
    folder = copy("gptq-4bit-64g-act-sym", tmp_path / "order")
    set_field(folder, desc_act=False)
    answers = asked(folder)
    assert "rows are in act-order, and config.json does not say so" in answers["vllm"].reason
    assert "would answer wrongly" in answers["sglang"].reason
    assert answers["transformers"].takes, "it reads g_idx"
    folder = copy("gptq_v2-4bit-64g-noact-asym", tmp_path / "zeros")
    set_field(folder, checkpoint_format="gptq", format="gptq")
    answers = asked(folder)
    assert "it reads zeros as v1, and these are v2" in answers["transformers"].reason
    assert "it reads zeros as v1, and these are v2" in answers["exllamav2"].reason
    folder = copy("gptq-4bit-64g-act-sym", tmp_path / "bits")
    set_field(folder, bits=8)
    assert "config.json says 8 bits, and" in asked(folder)["sglang"].reason


def test_files_that_are_missing_or_called_otherwise(tmp_path: Path) -> None:
    folder = copy("gptq-4bit-noneg-act-sym", tmp_path / "one")
    edit_json(folder / "config.json", lambda it: it.pop("quantization_config"))
    answers = asked(folder)
    assert "reads config.json, which says nothing of quantisation" in answers["vllm"].reason
    assert answers["gptqmodel"].takes, "it reads quantize_config.json"
    assert answers["exllamav2"].takes, "it looks at the tensors"
    rename_weights(folder, "gptq_model-4bit-128g.safetensors")
    answers = asked(folder)
    assert answers["gptqmodel"].takes
    assert "a file called gptq_model-4bit-128g.safetensors" in answers["llama.cpp"].reason


def test_what_nobody_knows_is_none(tmp_path: Path) -> None:
    folder = copy("gptq-4bit-128g-noact-sym", tmp_path / "one")
    edit_tensors(folder, lambda it: {k: v for k, v in it.items() if not k.endswith(".g_idx")})
    answers = asked(folder)
    assert answers["gptqmodel"].takes is None
    assert "have no g_idx" in answers["gptqmodel"].reason
    assert answers["llama.cpp"].takes is False


def test_ours_answers_for_each_host(tmp_path: Path) -> None:
    plugins = gptq.Plugins(installed=True)
    answers = {it.engine: it for it in find_where(str(DATA / ONE), plugins=plugins)}
    ours = {name: it.takes for name, it in answers.items() if name.startswith("gptq-loader")}
    assert ours == dict.fromkeys(ours, True)
    assert {"gptq-loader", "gptq-loader+vllm", "gptq-loader+webui"} <= set(ours)
    folder = copy(ONE, tmp_path / "grok")
    edit_json(folder / "config.json", lambda it: it.update(model_type="grok-1"))
    refused = find_where(str(folder), plugins=plugins)[-1]
    assert refused.takes is False
    assert "Python code of its own" in refused.reason
    edit_json(folder / "config.json", lambda it: it.update(model_type="nobody"))
    assert "no nobody models" in find_where(str(folder), plugins=plugins)[-1].reason


def test_on_the_hub_the_headers_are_enough(hub: HubServer) -> None:
    hub.add("owner/tiny-GPTQ", DATA / "gptq-4bit-noneg-act-sym")
    hub.add("owner/tiny-GPTQ", DATA / "gptq-3bit-128g-act-sym", branch="three")
    plugins = gptq.Plugins(installed=True, environ=ALL)
    for reference, folder in (
        ("owner/tiny-GPTQ", "gptq-4bit-noneg-act-sym"),
        ("owner/tiny-GPTQ:three", "gptq-3bit-128g-act-sym"),
    ):
        there = find_where(reference, plugins=plugins)
        here = find_where(str(DATA / folder), plugins=plugins)
        assert [it.takes for it in there] == [it.takes for it in here]
    ranges = [it.range for it in hub.bodies("model.safetensors")]
    assert all(ranges), "no weight file is fetched whole"


def test_what_cannot_be_asked_says_why(hub: HubServer, tmp_path: Path) -> None:
    plugins = gptq.Plugins(installed=True, environ=ALL)
    hub.add("owner/gated", DATA / ONE, access="gated")
    hub.add("owner/dense", DATA / "base")
    with pytest.raises(HubError, match="gated"):
        find_where("owner/gated", plugins=plugins)
    with pytest.raises(UnsupportedFormat, match="not quantised"):
        find_where("owner/dense", plugins=plugins)
    with pytest.raises(CheckpointNotFound):
        find_where(str(tmp_path / "nothing"), plugins=plugins)
    with pytest.raises(CheckpointNotFound):
        find_where("owner/nothing", plugins=plugins)


def test_the_command_writes_a_table_and_json() -> None:
    folder = str(DATA / "gptq-4bit-noneg-act-sym")
    shown = CliRunner().invoke(app, ["where", folder])
    assert shown.exit_code == 0, shown.output
    assert "| vllm-cpu " in shown.stdout
    assert "gptq-loader is in" in shown.stdout
    data = json.loads(CliRunner().invoke(app, ["where", folder, "--json"]).stdout)
    assert {"engine", "version", "takes", "reason", "source"} <= set(data[0])
    assert {it["takes"] for it in data} <= {True, False, None}


def test_the_column_of_a_table_leaves_ours_out() -> None:
    ours = asked(DATA / "gptq_v2-3bit-64g-act-asym")["gptqmodel"]
    assert engines_of([replace(ours, engine="gptq-loader", takes=True)]) == "ours alone"
    assert engines_of([ours, replace(ours, engine="vllm", takes=False)]) == "gptqmodel"


def test_a_pickle_is_for_those_that_open_it(tmp_path: Path) -> None:
    folder = copy("gptq-4bit-noneg-act-sym", tmp_path / "one")
    torch.save(load_file(folder / "model.safetensors"), folder / "gptq_model-4bit.pt")
    (folder / "model.safetensors").unlink()
    answers = asked(folder)
    assert answers["vllm"].takes
    assert "does not open a file called gptq_model-4bit.pt" in answers["transformers"].reason
    assert answers["gptqmodel"].takes is False
