"""The list of checkpoints on this machine: the models directories' and the hub's cache's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from altered import DATA, NAMES, ONE, PLUGINS, copy, plugins
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.catalog.local import local_models, report_model
from gptq_loader_plugin.checkpoint.config import read_stored_config
from gptq_loader_plugin.checkpoint.headers import read_headers
from gptq_loader_plugin.checkpoint.outline import outline
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.reference import resolve

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("GPTQ_LOADER_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_what_the_headers_tell(models: Path) -> None:
    """As the whole checkpoint tells it, for every kind of checkpoint there is."""
    device, offered = find_device("cpu"), plugins().kernels()
    for name in NAMES:
        copy(name, models / name)
    for it in local_models():
        report = report_model(it, device, offered, context=100)
        plan = gptq.explain(it.path, device="cpu", plugins=plugins())
        config = plan.config
        assert (report.bits, report.group_size) == (config.bits, config.group_size), it.name
        assert (report.desc_act, report.layers) == (config.desc_act, 14), it.name
        assert report.fit.fits, it.name
        assert report.fit.weight_bytes == plan.weight_bytes, it.name
        assert report.fit.kv_bytes == (plan.kv_bytes_per_token or 0) * 100


def test_the_outline_has_the_layers_that_reading_them_has(models: Path) -> None:
    for name in NAMES:
        folder = DATA / name
        stored, _ = read_stored_config(folder)
        headers = read_headers([folder / "model.safetensors"])
        found = outline(headers, stored, folder=folder, size_bytes=0)
        read = open_checkpoint(folder)
        blind = {"zero_range": (0, 0)} if not read.config.sym else {}  # it takes reading zeros
        assert [replace(it, **blind) for it in found.layers.values()] == [
            replace(it, **blind) for it in read.layers.values()
        ], name


def test_the_list_as_a_user_sees_it(models: Path) -> None:
    copy(ONE, models / "tiny")
    cut = copy(ONE, models / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:200_000])
    (copy(ONE, models / "typo") / "quantize_config.json").write_text('{"bits": "four"}')
    (models / "old").mkdir()
    (models / "old" / "llama-4bit-128g.pt").write_bytes(b"never opened")
    done = CliRunner().invoke(app, ["models", "--device", "cpu"], env=PLUGINS)
    assert done.exit_code == 0, done.stderr
    rows = [
        [cell.strip() for cell in it.strip("|").split("|")]
        for it in done.stdout.splitlines()
        if it[0] == "|"
    ]
    assert [(row[0], row[6]) for row in rows[2:]] == [
        ("cut", "damaged"), ("old", "?"), ("tiny", "yes"), ("typo", "damaged"),
    ]  # fmt: skip
    assert rows[4] == ["tiny", "4", "32", "yes", "14", "354 kB", "yes", "models directory"]
    assert "cut is damaged: " in done.stderr
    assert "cut short: " in done.stderr
    assert "typo is damaged: " in done.stderr
    assert 'bits is "four" in quantize_config.json' in done.stderr
    assert "  old: ?: a pickle (.pt, .bin) is not opened" in done.stdout
    done = CliRunner().invoke(app, ["models", "--json"], env=PLUGINS)
    data = {it["name"]: it for it in json.loads(done.stdout)}
    assert data["tiny"]["path"] == str(models / "tiny")
    assert data["tiny"]["fit"]["fits"] is True
    assert "four" in data["typo"]["error"]
    assert data["typo"]["hint"]


def test_an_empty_machine_is_told_where_to_begin(models: Path) -> None:
    done = CliRunner().invoke(app, ["models"], env=PLUGINS)
    assert done.exit_code == 0
    assert not done.stdout
    assert str(models) in done.stderr
    assert "gptq-loader download" in done.stderr


def test_a_machine_without_models(models: Path) -> None:
    assert not models.exists()
    assert local_models() == []


def test_folders_of_the_models_directory(models: Path) -> None:
    copy(ONE, models / "tiny")
    copy(ONE, models / "owner" / "name")
    copy(ONE, models / ".hidden")
    (copy(ONE, models / "no-config") / "quantize_config.json").unlink(missing_ok=True)
    config = models / "no-config" / "config.json"
    settings = json.loads(config.read_text())
    settings.pop("quantization_config", None)
    config.write_text(json.dumps(settings))
    dense = copy(ONE, models / "awq")
    (dense / "quantize_config.json").unlink(missing_ok=True)
    (dense / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    (models / "empty").mkdir()
    found = local_models()
    assert [it.name for it in found] == ["no-config", "owner/name", "tiny"]
    for it in found:
        assert resolve(it.name, plugins=plugins()) == it.path
        assert it.size_bytes == sum(file.stat().st_size for file in it.path.glob("*.safetensors"))
        assert it.source == "models directory"


def test_a_damaged_config_is_still_listed(models: Path) -> None:
    (copy(ONE, models / "cut") / "quantize_config.json").write_text('{"bits": ')
    assert [it.name for it in local_models()] == ["cut"]


def test_old_pickles_are_listed_by_name_and_not_opened(models: Path) -> None:
    for folder, file in (("old", "llama-4bit-128g.pt"), ("dense", "pytorch_model.bin")):
        (models / folder).mkdir(parents=True)
        (models / folder / file).write_bytes(b"never opened")
    assert [it.name for it in local_models()] == ["old"]


def test_branches_of_the_cache(models: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    for branch, commit in (("main", "a" * 40), ("gptq-4bit", "b" * 40), (None, "c" * 40)):
        copy(ONE, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        if branch:
            (repository / "refs" / branch).write_text(commit)
    shutil.copytree(
        models.parent / "hub" / "models--owner--name", tmp_path / "hub" / "datasets--x--y"
    )
    copy(ONE, models / "tiny")
    names = [(it.name, it.source) for it in local_models()]
    assert names == [
        ("tiny", "models directory"),
        ("owner/name", "Hugging Face cache"),
        ("owner/name:" + "c" * 40, "Hugging Face cache"),
        ("owner/name:gptq-4bit", "Hugging Face cache"),
    ]
    assert [it.name for it in local_models(cache=False)] == ["tiny"]


def test_the_models_directory_goes_before_the_cache(models: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    copy(ONE, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    copy(ONE, models / "owner" / "name")
    assert [(it.name, it.source) for it in local_models()] == [("owner/name", "models directory")]
    assert resolve("owner/name", plugins=plugins()) == models / "owner" / "name"
