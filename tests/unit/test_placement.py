"""A model over several places: planned with their kernels, and answering the same."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from altered import CPU_KERNELS, DATA, ONE, PLUGINS, plugins
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.cli.app import app

BLOCKS = {"": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}


def logits(model: gptq.LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.model(torch.arange(20)[None]).logits
    return found


@pytest.mark.parametrize("backend", [*CPU_KERNELS, "dense", "reference"])
def test_a_block_on_the_disk_answers_the_same(tmp_path: Path, backend: str) -> None:
    with gptq.load(DATA / ONE, device="cpu", backend=backend, plugins=plugins()) as whole:
        expected = logits(whole)
        reply = whole.generate("Hello", gptq.GenerateOptions(max_new_tokens=8, temperature=0))
    split = gptq.load(
        DATA / ONE, backend=backend, device_map=BLOCKS, offload_folder=tmp_path, plugins=plugins()
    )
    with split:
        assert torch.equal(logits(split), expected)
        options = gptq.GenerateOptions(max_new_tokens=8, temperature=0)
        assert split.generate("Hello", options).text == reply.text
        text = split.explain()
    assert "on disk" in text
    assert "read from there whenever they are needed" in text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_what_is_on_the_disk_is_a_file_and_leaves_none(tmp_path: Path) -> None:
    split = gptq.load(DATA / ONE, device_map=BLOCKS, offload_folder=tmp_path, plugins=plugins())
    assert mapped_from(split.model, "model.layers.1.mlp.down_proj", tmp_path)
    assert not mapped_from(split.model, "model.layers.0.mlp.down_proj", tmp_path)
    assert list(tmp_path.iterdir()) == []
    split.close()
    del split
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def mapped_from(model: Any, path: str, folder: Path) -> bool:
    """Whether the largest tensor of a layer lies in a file of the folder."""
    address = max(model.get_submodule(path).buffers(), key=lambda it: it.nbytes).data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(it, 16) for it in line.split()[0].split("-"))
        if first <= address < last:
            return str(folder) in line
    return False


def test_auto_fills_one_place_after_another() -> None:
    plan = gptq.explain(
        DATA / ONE, device_map="auto", max_memory={"cpu": "320kB", "disk": ""}, plugins=plugins()
    )
    names = [plan.place(f"model.layers.{i}.mlp.up_proj").name for i in range(2)]
    assert names == ["cpu", "disk"]
    assert plan.place("lm_head.weight").name == "cpu"
    assert plan.place_bytes["cpu"] <= 320_000
    assert sum(plan.place_bytes.values()) == plan.weight_bytes
    data = plan.to_json()
    assert {it["device"] for it in data["layers"]} == {"cpu", "disk"}
    assert data["place_bytes"] == plan.place_bytes


def test_every_layer_gets_the_kernel_of_its_own_device() -> None:
    """Planned for a GPU that is not here: its kernels on it, ours on the CPU."""
    plan = gptq.explain(
        DATA / ONE,
        device_map={"": "cuda:sm86", "model.layers.1": "cpu"},
        plugins=gptq.Plugins(installed=True),
    )
    kernels: dict[str, set[str]] = {"0": set(), "1": set()}
    for choice in plan.choices:
        kernels[choice.layer.name.split(".")[2]].add(choice.chosen.kernel)
    assert kernels["1"] == {CPU_KERNELS[0]}
    assert kernels["0"]
    assert not kernels["0"] & {"cpu", "cpu-int4"}
    with pytest.raises(gptq.OptionInvalid, match="is not on this machine"):
        gptq.load(DATA / ONE, device_map={"": "cuda:sm86", "model.layers.1": "cpu"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device_map": {"model.layers.0": "cpu"}}, "no place for"),
        ({"device_map": "balanced"}, "no device map is called"),
        ({"device_map": "auto", "max_memory": {"cpu": "1kB"}}, "parts fit"),
        ({"device_map": "auto", "max_memory": {"cpu": "much"}}, "is no size"),
        ({"device_map": "auto", "device": "cpu"}, "both a device and a device map"),
        ({"max_memory": {"cpu": "1GB"}}, "memory limits are for"),
        ({"device_map": BLOCKS}, "no folder is named"),
    ],
)
def test_what_cannot_be_is_said(options: dict[str, Any], words: str) -> None:
    with pytest.raises(gptq.OptionInvalid, match=words) as caught:
        gptq.load(DATA / ONE, plugins=plugins(), **options)
    assert caught.value.hint


def test_the_command_takes_limits_as_people_write_them(tmp_path: Path) -> None:
    limits = ["--device-map", "auto", "--max-memory", "cpu=320kB,disk"]
    done = CliRunner().invoke(app, ["explain", str(DATA / ONE), *limits, "--json"], env=PLUGINS)
    assert set(json.loads(done.stdout)["place_bytes"]) == {"cpu", "disk"}
    few = ["--prompt", "Hello", "--max-new-tokens", "4", "--temperature", "0"]
    whole = CliRunner().invoke(app, ["generate", str(DATA / ONE), *few], env=PLUGINS)
    limits += ["--offload-folder", str(tmp_path)]
    split = CliRunner().invoke(app, ["generate", str(DATA / ONE), *few, *limits], env=PLUGINS)
    assert split.exit_code == 0, split.stderr
    assert split.stdout == whole.stdout


def test_a_model_that_fits_is_in_one_place() -> None:
    plan = gptq.explain(DATA / ONE, device_map="auto", plugins=plugins())
    assert plan.place_bytes == {"cpu": plan.weight_bytes}
