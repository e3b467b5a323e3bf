"""The extension goes into text-generation-webui's user data and comes out again, and no more."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from processes import run_process

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    import subprocess

ROOT = Path(__file__).parents[2]


@pytest.fixture
def webui(tmp_path: Path) -> Path:
    """What a checkout has, as far as it is looked at."""
    folder = tmp_path / "text-generation-webui"
    (folder / "modules").mkdir(parents=True)
    (folder / "server.py").touch()
    (folder / "modules" / "models.py").touch()
    other = folder / "user_data" / "extensions" / "other"
    other.mkdir(parents=True)
    (other / "script.py").write_text("other")
    return folder


def content(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def command(*arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return run_process(
        [sys.executable, "-m", "gptq_loader_plugin", "webui", *map(str, arguments)],
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path)} | environ,
    )


def test_install_and_uninstall_are_idempotent_and_leave_no_trace(webui: Path) -> None:
    before = content(webui)
    host = gptq.Plugins(installed=True).host("webui")
    where = host.install(folder=webui)
    once = content(webui)
    assert set(once) - set(before) == {"user_data/extensions/gptq_loader/script.py"}
    (where / "script.py").write_text("an older version")
    assert host.install(folder=webui) == where
    assert content(webui) == once
    assert host.uninstall(folder=webui) == where
    assert content(webui) == before
    assert not where.exists()
    assert host.uninstall(folder=webui) is None
    assert content(webui) == before


def test_another_folder_is_refused(tmp_path: Path) -> None:
    host = gptq.Plugins(installed=True).host("webui")
    for refused in (
        lambda: host.install(folder=tmp_path),
        lambda: host.uninstall(folder=tmp_path),
        lambda: host.command(folder=tmp_path, arguments=()),
    ):
        with pytest.raises(gptq.OptionInvalid, match="is not the folder of text-generation-webui"):
            refused()
    with pytest.raises(gptq.OptionInvalid, match="takes one option, folder"):
        host.install()
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_it_did_and_what_to_do_next(webui: Path) -> None:
    completed = command("install", webui)
    assert completed.returncode == 0
    assert completed.stdout == ""
    assert f"installed into {webui}/user_data/extensions/gptq_loader\n" in completed.stderr
    assert "gptq-loader webui run" in completed.stderr
    completed = command("uninstall", WEBUI_DIR=str(webui))
    assert completed.stderr == f"removed {webui}/user_data/extensions/gptq_loader\n"
    assert command("uninstall", webui).stderr == "it is not installed there\n"
    completed = command("install", ROOT)
    assert completed.returncode == 1
    assert completed.stderr.startswith("error: ")
    assert "\nhint: name the folder" in completed.stderr


def test_run_starts_it_with_its_own_arguments_and_settings(webui: Path) -> None:
    """In that folder, as server.py; here one without the modules that are changed."""
    completed = command("run", "--dir", webui, "--", "--model", "x")
    assert completed.returncode == 1
    assert "error: this text-generation-webui has no modules.shared" in completed.stderr
    assert "hint: update gptq-loader-plugin" in completed.stderr
    (webui / "modules" / "shared.py").write_text(
        "import os, sys\nprint(sys.argv, os.getcwd(), os.environ.get('TQDM_DISABLE'))\n"
    )
    completed = command("run", "--dir", webui, "--", "--model", "x", "--verbose")
    assert completed.stdout == f"['server.py', '--model', 'x', '--verbose'] {webui} None\n"
    (webui / "modules" / "shared.py").write_text("import not_there_at_all\n")
    completed = command("run", "--dir", webui)
    assert "text-generation-webui needs not_there_at_all" in completed.stderr
