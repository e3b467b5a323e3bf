"""Model cards written from what the files show, and read again; and commands on a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import altered
import pytest
import yaml
from hub_server import BRANCHES, REPO, HubServer
from typer.testing import CliRunner

from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.checkpoint.card import read_card
from gptq_loader_plugin.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CARD = """---
base_model: maker/base
datasets: [rombodawg/LosslessMegaCodeTrainingV2, OpenAssistant/oasst1]
language: [en]
license: llama2
model_creator: OpenAssistant
model_name: Tiny SFT v10
---
# Tiny

Recommended system message:

```
<|im_start|>system
Be brief.<|im_end|>
```
"""
KERNELS = "core,kernel-cpu,kernel-dense,kernel-exllama,kernel-reference,kernel-torch"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer() as server:
        for branch, name in BRANCHES.items():
            folder = altered.copy(name, tmp_path_factory.mktemp("branch") / name)
            (folder / "README.md").write_text(CARD)
            server.add(REPO, folder, branch=branch)
        yield server


def run(
    hub: HubServer, home: Path, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **hub.environment(home / "hub"), "GPTQ_LOADER_PLUGINS": KERNELS,
               "GPTQ_LOADER_DATA": str(home / "data"), **more}  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "gptq_loader_plugin", *arguments],
        check=False, capture_output=True, text=True, timeout=300, env=environ,
    )  # fmt: skip


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_a_folders_card_renders_as_its_template(tmp_path: Path) -> None:
    folder = altered.copy("gptq-4bit-32g-act-sym", tmp_path / "tiny")
    written = tmp_path / "card" / "README.md"
    other = str(altered.DATA / "gptq-3bit-noneg-act-sym")
    arguments = ["card", str(folder), other, "--out", str(written), "--base-model", "maker/base"]
    done = CliRunner().invoke(app, [*arguments, "--license", "llama2"])
    assert done.exit_code == 0, done.stderr
    text = written.read_text()
    fields = front(text)
    assert fields["base_model"] == "maker/base"
    assert fields["license"] == "llama2"
    assert fields["tags"] == ["gptq", "3-bit", "4-bit"]
    assert "| tiny | 4 | 32 | Yes | 0.1 |" in text
    assert "| gptq-3bit-noneg-act-sym | 3 | None | Yes |" in text
    assert "| gptq-loader | yes | yes |" in text
    card = read_card(written.parent)
    own = find_template(folder, card=read_card(folder))
    told = find_template(written.parent, card=card, named="card")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert told.render(messages) == own.render(messages)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1
    assert "is there already" in again.stderr


def test_a_card_is_read(tmp_path: Path) -> None:
    folder = altered.copy("gptq-4bit-32g-act-sym", tmp_path / "tiny")
    (folder / "README.md").write_text(CARD)
    done = CliRunner().invoke(app, ["card", str(folder), "--read", "--json"])
    assert json.loads(done.stdout) == {
        "prompt_template": None,
        "system": "Be brief.",
        "base_model": "maker/base",
        "license": "llama2",
        "datasets": ["rombodawg/LosslessMegaCodeTrainingV2", "OpenAssistant/oasst1"],
        "languages": ["en"],
        "model_creator": "OpenAssistant",
        "model_name": "Tiny SFT v10",
    }


def test_a_repositorys_card_has_its_six_branches(hub: HubServer, tmp_path: Path) -> None:
    done = run(hub, tmp_path, "card", REPO)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    for branch, name in BRANCHES.items():
        assert f"| [{branch}](https://huggingface.co/{REPO}/tree/{branch}) | {name[5]} |" in text
    fields = front(text)
    assert fields["model_name"] == "Tiny SFT v10"
    assert fields["datasets"] == ["rombodawg/LosslessMegaCodeTrainingV2", "OpenAssistant/oasst1"]
    assert "Recommended system message:\n\n```\nBe brief.\n```" in text
    assert f"gptq-loader download {REPO}:gptq-3bit--1g-actorder_True" in text
    assert not list((tmp_path / "hub").rglob("*.safetensors")), "headers alone are read"


def test_the_commands_take_branches_of_a_hub(hub: HubServer, tmp_path: Path) -> None:
    three, four = (f"{REPO}:gptq-{it}-actorder_True" for it in ("3bit--1g", "4bit-32g"))
    out = tmp_path / "three.gguf"
    done = run(hub, tmp_path, "convert", three, str(out), "--to", "gguf", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exact"] is True
    compared = run(
        hub, tmp_path, "compare", four, three, "--windows", "1", "--window-tokens", "32",
        "--no-speed", "--no-check", "--device", "cpu", "--json",
    )  # fmt: skip
    assert [it["bits"] for it in json.loads(compared.stdout)["models"]] == [4, 3]
    repaired = run(hub, tmp_path, "repair", three, "--dry-run", "--json")
    assert json.loads(repaired.stdout)["changes"] == []
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\n")
    offline = run(
        hub, tmp_path, "sample", four, three, "--prompts", str(prompts), "--out", str(tmp_path),
        "--max-new-tokens", "2", "--no-check", "--device", "cpu", "--json", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert offline.returncode == 0, offline.stderr
    assert len(json.loads(offline.stdout)["reports"]) == 2
