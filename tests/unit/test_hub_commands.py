"""Every command on a repository that it cannot have, or not yet: gated, offline, away, killed."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import pytest
from altered import DATA, PLUGINS, copy
from hub_server import STRANGER, HubServer
from processes import run_process, start_process
from typer.testing import CliRunner
from waiting import eventually

from gptq_loader_plugin.cli.app import app

if TYPE_CHECKING:
    import subprocess
    from contextlib import AbstractContextManager
    from pathlib import Path

    from click.testing import Result

REPO = "owner/tiny-GPTQ"
BRANCH = f"{REPO}:main"
ONE, OTHER = "gptq-4bit-32g-act-sym", "gptq-3bit-128g-act-sym"
WEIGHTS, SLOW = "model.safetensors", 30_000  # bytes a second: of 340,000
QUICK = ["--device", "cpu", "--no-check"]
# What each is asked, with {ref} for the reference and {folder} for a place to write to.
ASKED = {
    "where": ["{ref}"],
    "forecast": ["{ref}"],
    "branches": ["{ref}"],
    "card": ["{ref}"],
    "card --out": ["{ref}", "--out", "{folder}/CARD.md"],
    "card --read": ["{ref}", "--read"],
    "verify": ["{ref}", "--device", "cpu", "--no-split"],
    "doctor": ["{ref}", "--symptom", "crash"],
    "convert": ["{ref}", "{folder}/out", "--to", "dense"],
    "repair": ["{ref}", "--dry-run"],
    "compare": [str(DATA / OTHER), "{ref}", "--windows", "1", "--window-tokens", "32",
                "--no-speed", "--html", "{folder}/page.html", *QUICK],
    "sample": ["{ref}", "--prompts", "{folder}/prompts.txt", "--max-new-tokens", "2", "--limit",
               "1", "--out", "{folder}", "--html", "{folder}/page.html", *QUICK],
}  # fmt: skip
LISTS = ("branches",)  # what no copy can answer: it is about all of a repository
READS = ("where", "forecast", "branches", "card", "card --read")  # headers and small files alone


@pytest.fixture(autouse=True)
def repository(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    folder = copy(ONE, tmp_path / "source")
    (folder / "README.md").write_text("---\nlicense: llama2\n---\n# Tiny\n")
    hub.add(REPO, folder)
    monkeypatch.setenv("GPTQ_LOADER_PLUGINS", PLUGINS["GPTQ_LOADER_PLUGINS"])
    return hub


def arguments(command: str, folder: Path, reference: str = BRANCH) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("Hello\nAnd you?\n")
    asked = [it.format(ref=reference, folder=folder) for it in ASKED[command]]
    return [command.partition(" ")[0], *asked]


def refused(done: Result, folder: Path) -> tuple[str, str]:
    """Hold a refusal to one error with its next step, and nothing else; return both."""
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 1, done.output
    assert not done.stdout
    *before, error, hint = done.stderr.splitlines()
    assert not any(it.startswith(("error:", "Traceback")) for it in before)
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert [it.name for it in folder.iterdir()] == ["prompts.txt"], "nothing is left"
    return error, hint


def download(hub: HubServer) -> None:
    done = CliRunner().invoke(app, ["download", BRANCH])
    assert done.exit_code == 0, done.stderr
    hub.requests.clear()


@pytest.mark.parametrize("command", ASKED)
def test_a_gated_repository(
    command: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO].access = "gated"
    for token, words, step in (
        ("", "its owner must let you in", "then log in: hf auth login"),
        (STRANGER, "your account has not been let in", "and wait for its owner"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        done = CliRunner().invoke(app, arguments(command, tmp_path / "out"))
        if command in LISTS:  # a gated repository still tells what its branches are called
            assert done.exit_code == 0, done.stderr
            assert words in done.stdout
            assert step in done.stderr
            continue
        error, hint = refused(done, tmp_path / "out")
        assert f"{REPO} is gated: {words}" in error
        assert f"accept its terms on {hub.url}/{REPO}, {step}" in hint


@pytest.mark.parametrize("command", ASKED)
def test_a_hub_that_cannot_be_asked(
    command: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error, hint = refused(CliRunner().invoke(app, arguments(command, tmp_path / "out")),
                          tmp_path / "out")  # fmt: skip
    assert "HF_HUB_OFFLINE keeps the hub from being asked" in error
    assert "unset HF_HUB_OFFLINE" in hint
    assert hub.requests == []
    monkeypatch.undo()


@pytest.mark.parametrize("command", [it for it in ASKED if it not in LISTS])
def test_what_is_in_the_cache_needs_no_hub(
    command: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = CliRunner().invoke(app, arguments(command, tmp_path / "out"))
    assert done.exit_code == 0, done.stderr
    assert hub.requests == []


def test_a_card_of_all_branches_needs_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = CliRunner().invoke(app, arguments("card", tmp_path / "out", REPO))
    error, hint = refused(done, tmp_path / "out")
    assert "HF_HUB_OFFLINE keeps the hub from being asked" in error
    assert f"for a card of the branch that is here, name it: {BRANCH}; or unset" in hint


def line(command: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "gptq_loader_plugin", *arguments(command, folder)]


def started(command: str, folder: Path) -> AbstractContextManager[subprocess.Popen[str]]:
    """Start a command whose download takes its time."""
    return start_process(line(command, folder), start_new_session=True)


def begun(command: str, hub: HubServer, cache: Path) -> None:
    """Wait until some of the weights have come."""
    _, digest = hub.hashes(hub.repos[REPO].branches["main"] / WEIGHTS)

    def come() -> bool:
        if command in READS:
            return bool(hub.bodies(WEIGHTS))
        return any(it.stat().st_size for it in cache.rglob(f"{digest}.incomplete"))

    eventually(come, 120, awaited="the beginning of the weights")


@pytest.mark.parametrize("command", ["convert", "verify", "compare", "sample", "card"])
def test_a_command_that_ctrl_c_ends_goes_on(command: str, hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    hub.misbehave(f"*/{WEIGHTS}", slow=SLOW)
    with started(command, folder) as process:
        begun(command, hub, tmp_path / "hf")
        process.send_signal(signal.SIGINT)
        shown, words = process.communicate(timeout=120)
    assert process.returncode == 130, words
    assert "stopped" in words
    assert "Traceback" not in words
    assert not shown
    assert [it.name for it in folder.iterdir()] == ["prompts.txt"]
    hub.behave()
    done = run_process(line(command, folder), check=True)
    assert "Traceback" not in done.stderr
    if command not in READS:
        assert "it goes on" in words
        assert hub.bodies(WEIGHTS)[-1].range, "what had come was kept"


@pytest.mark.parametrize("command", ["convert", "verify", "compare", "sample"])
def test_a_command_that_is_killed_leaves_nothing_in_the_way(
    command: str, hub: HubServer, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    hub.misbehave(f"*/{WEIGHTS}", slow=SLOW)
    with started(command, folder) as process:
        begun(command, hub, tmp_path / "hf")
        process.kill()
        process.communicate(timeout=120)
    hub.behave()
    run_process(line(command, folder), check=True)
    assert hub.bodies(WEIGHTS)[-1].range, "what had come was kept"
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
    assert not [it.name for it in folder.iterdir() if it.name.startswith(".")]
