"""What a user types names a checkpoint, or says why not; the hub is a small server on loopback."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from altered import DATA, ONE, copy, plugins
from hub_server import HubServer
from processes import run_process

import gptq_loader_plugin as gptq
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.hub.hub_reference import HubReference, parse_hub_reference
from gptq_loader_plugin.reference import models_folders, resolve

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("TheBloke/model-GPTQ", HubReference("TheBloke/model-GPTQ")),
        ("a/b:gptq-4bit-32g-actorder_True", HubReference("a/b", "gptq-4bit-32g-actorder_True")),
        ("a/b:refs/pr/1", HubReference("a/b", "refs/pr/1")),
        ("https://huggingface.co/a/b", HubReference("a/b")),
        ("https://huggingface.co/a/b/tree/gptq-3bit?x=1", HubReference("a/b", "gptq-3bit")),
        ("https://huggingface.co/a/b:c/", HubReference("a/b", "c")),
        ("https://huggingface.co/a", None),
        ("https://example.org/a/b", None),
        ("C:\\models\\x", None),
        ("/models/a/b", None),
        ("a/b/c", None),
        ("a/b:../../c", None),
        ("a/..:x", None),
        ("a/b:", None),
        ("../a/b", None),
        ("model", None),
    ],
)
def test_hub_references_are_told_from_paths(text: str, found: HubReference | None) -> None:
    assert parse_hub_reference(text) == found


def test_a_branch_is_named_once() -> None:
    assert parse_hub_reference("a/b", revision="dev") == HubReference("a/b", "dev")
    assert parse_hub_reference("a/b:dev", revision="dev") == HubReference("a/b", "dev")
    with pytest.raises(gptq.OptionInvalid, match="names the branch dev, and revision is main"):
        parse_hub_reference("a/b:dev", revision="main")


def test_folders_files_and_the_models_directory(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "models" / "tiny")
    environ = {"GPTQ_LOADER_MODELS": str(tmp_path / "models")}
    for reference in (folder, str(folder), folder / "model.safetensors"):
        assert resolve(reference, plugins=plugins(), environ=environ) == Path(reference)
    assert resolve("tiny", plugins=plugins(), environ=environ) == folder
    downloaded = copy(ONE, tmp_path / "models" / "TheBloke_tiny-GPTQ_dev")
    found = resolve("TheBloke/tiny-GPTQ:dev", plugins=plugins(), environ=environ)
    assert found == downloaded, "as text-generation-webui names a downloaded branch"
    assert models_folders({}) == [Path("models")]
    with pytest.raises(gptq.CheckpointNotFound):  # another branch than the one that is here
        resolve(
            "TheBloke/tiny-GPTQ", revision="x", plugins=plugins(), environ=environ, download=False
        )
    found = resolve("TheBloke/tiny-GPTQ", revision="dev", plugins=plugins(), environ=environ)
    assert found == downloaded


def test_what_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    environ = {"GPTQ_LOADER_MODELS": str(tmp_path)}
    with pytest.raises(gptq.CheckpointNotFound) as caught:
        resolve("tinny", plugins=plugins(), environ=environ)
    assert caught.value.tried == ("tinny", str(tmp_path / "tinny"))
    assert "demo" in caught.value.hint


def test_a_link_to_nothing_is_no_repository(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("gone")
    with pytest.raises(gptq.CheckpointNotFound, match="is a link to gone, which is not there"):
        resolve(tmp_path / "model", plugins=plugins())


@pytest.mark.parametrize(
    ("name", "words"), [("model.gguf", "llama.cpp"), ("notes.txt", ".safetensors or .pt")]
)
def test_another_kind_of_file(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(gptq.UnsupportedFormat) as caught:
        resolve(tmp_path / name, plugins=plugins())
    assert words in caught.value.hint


def test_one_file_of_a_folder(tmp_path: Path) -> None:
    """A repository with several checkpoints in one folder: the user names the file."""
    folder = copy(ONE, tmp_path)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes(b"another")
    with gptq.load(folder / "one.safetensors", device="cpu", plugins=plugins()) as model:
        assert model.generate("a", gptq.GenerateOptions(max_new_tokens=1)).tokens == 1


def test_a_plugin_may_resolve_a_reference_first() -> None:
    class Finder:
        @hookimpl
        def gptq_resolve(self, reference: str) -> Path | None:
            return DATA / ONE if reference == "tiny!" else None

    found = gptq.Plugins(Finder(), installed=True)
    assert resolve("tiny!", plugins=found) == DATA / ONE
    assert gptq.inspect("tiny!", plugins=found).bits == 4


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("TheBloke/tiny-GPTQ", DATA / ONE)
        server.add("TheBloke/tiny-GPTQ", DATA / "gptq-3bit-128g-act-sym", branch="3bit")
        server.add("owner/gated", DATA / ONE, access="gated")
        yield server


@pytest.fixture
def machine(hub: HubServer, tmp_path: Path) -> dict[str, str]:
    """The environment of a machine whose hub is here, with an empty cache."""
    others = {name: it for name, it in os.environ.items() if not name.startswith("HF_")}
    nowhere = {"GPTQ_LOADER_MODELS": str(tmp_path / "none")}
    return others | hub.environment(tmp_path / "hf") | nowhere


def run(machine: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    # a process of its own: huggingface_hub reads its environment once, when it is imported
    return run_process([sys.executable, "-m", "gptq_loader_plugin", *command], env=machine)


def test_a_branch_is_fetched_once_and_then_found(hub: HubServer, machine: dict[str, str]) -> None:
    reference = "TheBloke/tiny-GPTQ:3bit"
    absent = run(machine, "inspect", reference)
    assert absent.returncode == 1
    assert f"hint: fetch it first: gptq-loader download {reference}" in absent.stderr
    completed = run(machine, "download", reference)
    assert completed.returncode == 0, completed.stderr
    assert re.search(r"download: \d+ % TheBloke/tiny-GPTQ:3bit", completed.stderr)
    assert "download: 100 %" in completed.stderr
    folder = Path(completed.stdout.strip())
    stored = (DATA / "gptq-3bit-128g-act-sym" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == stored
    report = json.loads(run(machine, "inspect", reference, "--json").stdout)
    assert (report["bits"], report["reference"]) == (3, reference)
    fetched = len(hub.bodies())
    again = run(machine, "generate", reference, "--prompt", "a", "--max-new-tokens", "1")
    assert again.returncode == 0, again.stderr
    assert len(hub.bodies()) == fetched, "nothing was fetched twice"


def test_revision_names_the_branch_too(hub: HubServer, machine: dict[str, str]) -> None:
    command = ("generate", "TheBloke/tiny-GPTQ", "--revision", "3bit", "--prompt", "a")
    completed = run(machine, *command, "--max-new-tokens", "1", "--json")
    assert completed.returncode == 0, completed.stderr
    assert hub.bodies()
    assert (
        json.loads(run(machine, "inspect", "TheBloke/tiny-GPTQ:3bit", "--json").stdout)["bits"] == 3
    )


def test_without_a_network_the_cache_answers(machine: dict[str, str]) -> None:
    reference = "TheBloke/tiny-GPTQ"
    assert run(machine, "download", reference).returncode == 0
    gone = machine | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    completed = run(gone, "generate", reference, "--prompt", "a", "--max-new-tokens", "1")
    assert completed.returncode == 0, completed.stderr
    other = run(gone, "generate", f"{reference}:3bit", "--prompt", "a")
    assert other.returncode == 1
    assert "hint: check the network" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("TheBloke/tiny-GPTQ:5bit", "has no branch, tag or commit 5bit", "list its branches"),
        ("TheBloke/none", "there is no repository TheBloke/none on the hub", "spelling"),
        ("owner/gated", "owner/gated is gated", "accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(
    machine: dict[str, str], reference: str, message: str, hint: str
) -> None:
    completed = run(machine, "download", reference)
    assert completed.returncode == 1
    assert message in completed.stderr
    assert hint in completed.stderr
    assert "Traceback" not in completed.stderr


def test_a_git_clone_without_lfs_is_said_in_words(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3896723888\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(gptq.CorruptCheckpoint, match="git-lfs pointer") as caught:
        gptq.inspect(folder, plugins=plugins())
    assert "git lfs pull" in caught.value.hint
