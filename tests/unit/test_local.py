"""The list of checkpoints on this machine: the models directories' and the hub's cache's."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from altered import ONE, copy, plugins

from gptq_loader_plugin.local import local_models
from gptq_loader_plugin.reference import resolve

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("GPTQ_LOADER_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


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
