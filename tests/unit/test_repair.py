"""What a checkpoint's small files lack, or say wrongly, is shown, kept and corrected."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import altered
import pytest
from typer.testing import CliRunner

from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.convert.options import ConvertOptions
from gptq_loader_plugin.convert.run import convert_checkpoint
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.repair import apply_changes, plan_repair

if TYPE_CHECKING:
    from pathlib import Path

NAMES = sorted(it.name for it in altered.DATA.iterdir() if it.name.startswith("gptq"))
NAME = "gptq-4bit-32g-act-sym"


def changed(folder: Path) -> list[str]:
    return sorted(it.file.name for it in plan_repair(folder).changes)


@pytest.mark.parametrize("name", NAMES)
def test_a_good_checkpoint_is_left_alone(name: str) -> None:
    planned = plan_repair(altered.DATA / name)
    assert planned.changes == ()
    assert planned.notes == ()


@pytest.mark.parametrize("name", NAMES)
def test_configs_are_written_again_from_the_tensors(name: str, tmp_path: Path) -> None:
    folder = altered.copy(name, tmp_path / "checkpoint")
    right = open_checkpoint(folder).config
    altered.without_config(folder)
    planned = plan_repair(folder)
    assert [it.file.name for it in planned.changes] == ["quantize_config.json", "config.json"]
    kept = apply_changes(planned.changes)
    assert [it.name for it in kept] == ["config.json.before-repair-1"]
    repaired = open_checkpoint(folder)
    assert repaired.warnings == ()
    for field in ("bits", "group_size", "sym", "checkpoint_format", "zeros"):
        assert getattr(repaired.config, field) == getattr(right, field)
    assert changed(folder) == []
    inner = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert inner["quant_method"] == "gptq"


@pytest.mark.parametrize(
    ("field", "lie"), [("bits", 8), ("group_size", 128), ("desc_act", False), ("sym", False)]
)
def test_a_lie_is_shown_and_corrected(field: str, lie: object, tmp_path: Path) -> None:
    folder = altered.copy(NAME, tmp_path / "checkpoint")
    right = getattr(open_checkpoint(folder).config, field)
    altered.set_field(folder, **{field: lie})
    planned = plan_repair(folder)
    assert changed(folder) == ["config.json", "quantize_config.json"]
    for change in planned.changes:
        assert f"{field} is {json.dumps(lie)}" in change.why
        assert any(
            line.startswith("+ ") and f'"{field}": {json.dumps(right)}' in line
            for line in change.diff().splitlines()
        )
    apply_changes(planned.changes)
    assert getattr(open_checkpoint(folder).config, field) == right
    assert changed(folder) == []
    kept = json.loads((folder / "quantize_config.json.before-repair-1").read_text())
    assert kept[field] == lie


@pytest.mark.parametrize("file", ["quantize_config.json", "config.json"])
def test_a_file_that_is_no_json_is_written_again(file: str, tmp_path: Path) -> None:
    folder = altered.copy(NAME, tmp_path / "checkpoint")
    (folder / file).write_text('{"bits": 4,')
    apply_changes(plan_repair(folder, sibling=altered.DATA / "base").changes)
    assert changed(folder) == []
    assert (folder / f"{file}.before-repair-1").read_text() == '{"bits": 4,'
    assert altered.off_by(folder, NAME) < 1e-4


@pytest.mark.parametrize("lies", [False, True])
def test_an_index_is_written_from_the_headers(lies: bool, tmp_path: Path) -> None:
    options = ConvertOptions("safetensors", shard_bytes=100_000)
    source, folder = altered.DATA / NAME, tmp_path / "out"
    convert_checkpoint(source, folder, options=options, plugins=Plugins())
    assert changed(folder) == []
    index = folder / "model.safetensors.index.json"
    right = json.loads(index.read_text())
    if lies:
        files = sorted(set(right["weight_map"].values()))
        moved = dict.fromkeys(right["weight_map"], files[0]) | {"more": files[-1]}
        index.write_text(json.dumps({"weight_map": {**moved, "last": files[1], "l": files[2]}}))
    else:
        index.unlink()
    apply_changes(plan_repair(folder).changes)
    assert json.loads(index.read_text()) == {
        "metadata": right["metadata"], "weight_map": dict(sorted(right["weight_map"].items())),
    }  # fmt: skip


def test_a_tokenizer_comes_from_a_sibling(tmp_path: Path) -> None:
    folder = altered.copy(NAME, tmp_path / "checkpoint")
    for file in folder.glob("*token*"):
        file.unlink()
    assert "tokenizer is missing" in plan_repair(folder).notes[0]
    planned = plan_repair(folder, sibling=altered.DATA / "base")
    apply_changes(planned.changes)
    for file in planned.changes:
        assert file.file.read_bytes() == (altered.DATA / "base" / file.file.name).read_bytes()
    assert (folder / "tokenizer.json").is_file()
    assert plan_repair(folder).notes == ()


def test_a_sibling_of_another_kind_is_refused(tmp_path: Path) -> None:
    other = altered.copy("base", tmp_path / "other")
    altered.edit_json(other / "config.json", lambda it: it.update(model_type="qwen2"))
    with pytest.raises(OptionInvalid, match="qwen2"):
        plan_repair(altered.DATA / NAME, sibling=other)


def test_the_command_shows_and_asks(tmp_path: Path) -> None:
    folder = altered.copy(NAME, tmp_path / "checkpoint")
    altered.set_field(folder, bits=8)
    before = (folder / "config.json").read_text()
    runner = CliRunner()
    seen = runner.invoke(app, ["repair", str(folder), "--dry-run"])
    assert seen.exit_code == 0
    assert '-  "bits": 8' in seen.stdout
    asked = runner.invoke(app, ["repair", str(folder)])
    assert asked.exit_code == 1
    assert "--yes" in asked.stderr
    assert (folder / "config.json").read_text() == before
    done = runner.invoke(app, ["repair", str(folder), "--yes", "--json"])
    data = json.loads(done.stdout)
    assert data["written"] is True
    assert len(data["backups"]) == 2
    assert changed(folder) == []
