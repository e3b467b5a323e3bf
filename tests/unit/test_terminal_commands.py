"""Commands as people type them in a terminal: narrow, mistyped, half of it damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from altered import ALL, DATA, ONE, PLUGINS, copy
from processes import run_process
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.catalog.local import local_models
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.cli.options import valid_text
from gptq_loader_plugin.quantize.demo import demo_folder

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

OTHER = "gptq-3bit-128g-act-sym"
PROGRAM = [sys.executable, "-m", "gptq_loader_plugin"]


def run(*arguments: str | Path, env: dict[str, str] = PLUGINS, **options: Any) -> Result:
    return CliRunner().invoke(app, [str(it) for it in arguments], env=env, **options)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    folder = copy(ONE, tmp_path / "damaged")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return folder


def test_a_damaged_checkpoint_is_a_row(damaged: Path) -> None:
    completed = run("inspect", DATA / ONE, DATA / OTHER, damaged, env=ALL)
    assert completed.exit_code == 1
    table = [line for line in completed.stdout.splitlines() if line.startswith("| ")]
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == [ONE, OTHER, "damaged"]
    assert "error: " in completed.stderr
    assert "hint: " in completed.stderr
    listed = json.loads(run("inspect", DATA / ONE, damaged, "--json").stdout)
    assert listed[0]["bits"] == 4
    assert {"reference", "error", "hint"} == set(listed[1])
    alone = run("inspect", damaged)
    assert alone.exit_code == 1
    assert alone.stdout == ""


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are another thing there")
def test_tables_fit_a_narrow_terminal(damaged: Path) -> None:
    from terminal import open_terminal

    models = damaged.parent
    for command in (["inspect", DATA / ONE, damaged], ["models"], ["inspect", DATA / ONE]):
        with open_terminal(
            [*PROGRAM, *command],
            columns=60,
            rows=100,
            stderr=subprocess.DEVNULL,  # errors are one line each, to be copied
            env={**PLUGINS, "GPTQ_LOADER_MODELS": str(models)},
        ) as terminal:
            terminal.wait_for_end()
            lines = terminal.raw.decode().splitlines()
        assert not any(line.startswith("|") for line in lines)
        words = "damaged" if "models" in command or damaged in command else "quantised layers"
        assert any(words in line for line in lines)
        # an address or a path has no place to be broken at
        assert not any(len(line) > 60 and " " in line.strip() for line in lines), lines


def test_help_and_completion() -> None:
    assert run("chat", "-h").stdout == run("chat", "--help").stdout
    assert "--install-completion" in run("-h").stdout
    # else typer goes by the shell that it was started from
    named = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for shell in ("bash", "zsh", "fish"):
        asked = [*PROGRAM, "--show-completion", shell]
        script = run_process(asked, check=True, env=named).stdout
        assert "_GPTQ_LOADER_COMPLETE" in script or "COMPLETE" in script


def test_a_shell_completes_commands_options_and_checkpoints(tmp_path: Path) -> None:
    copy(ONE, tmp_path / "mine")
    for words, completed in (
        ("gptq-loader ch", "chat"),
        ("gptq-loader chat --temp", "--temperature"),
        ("gptq-loader chat mi", "mine"),
    ):
        env = {
            **PLUGINS,
            "GPTQ_LOADER_MODELS": str(tmp_path),
            "_GPTQ_LOADER_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        }
        answer = CliRunner().invoke(app, [], env=env, prog_name="gptq-loader")
        assert completed in answer.stdout.split()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["chta", "demo"], "chat"),
        (["chat", "dmeo"], "did you mean demo?"),
        (["chat", "min"], "did you mean mine?"),
        (["chat", "demo", "--temprature", "1"], "--temperature"),
        (["explain", str(DATA / ONE), "--backend", "exlama"], "did you mean exllama?"),
        (["explain", str(DATA / ONE), "--device", "cuda:sm99"], "sm90"),
    ],
)
def test_near_names_are_suggested(typed: list[str], meant: str, tmp_path: Path) -> None:
    copy(ONE, tmp_path / "mine")
    completed = run(*typed, env={**ALL, "GPTQ_LOADER_MODELS": str(tmp_path)})
    assert completed.exit_code in (1, 2)
    assert meant in completed.output
    assert len(completed.stderr.splitlines()) < 8


def test_the_demo_is_listed_once_it_is_made(tmp_path: Path) -> None:
    env = {**PLUGINS, "GPTQ_LOADER_CACHE": str(tmp_path), "GPTQ_LOADER_MODELS": str(tmp_path / "m")}
    assert "demo" not in [it["name"] for it in json.loads(run("models", "--json", env=env).stdout)]
    copy(ONE, demo_folder({"GPTQ_LOADER_CACHE": str(tmp_path)}))
    listed = json.loads(run("models", "--json", env=env).stdout)
    assert listed[0]["name"] == "demo"
    assert listed[0]["bits"] == 4
    assert "demo" not in [it.name for it in local_models(cache=False, environ=env)]


def test_what_a_terminal_writes_in_another_encoding_is_named() -> None:
    completed = run("generate", DATA / ONE, "--prompt", "caf\udce9")
    assert completed.exit_code == 2
    assert "LANG=C.UTF-8" in completed.stderr
    assert valid_text("café") == "café"


def test_nothing_is_read_of_a_model_that_is_not_there(tmp_path: Path) -> None:
    completed = run("quantize", tmp_path / "nowhere", tmp_path / "out")
    assert completed.exit_code == 1
    assert completed.stderr.startswith("error: there is no ")
    assert issubclass(gptq.BadReference, gptq.GPTQLoaderError)


def test_every_usage_is_written_one_way() -> None:
    for name in ("chat", "quantize", "demo", "doctor", "tune", "inspect"):
        usage = run(name, "--help").stdout.partition("Usage:")[2].splitlines()[0]
        arguments = usage.partition("[OPTIONS]")[2]
        assert arguments == arguments.upper()
        assert "[[" not in arguments
