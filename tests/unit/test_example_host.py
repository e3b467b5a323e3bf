"""`examples/my_host`, installed as its readers would, is found, says how it is, and answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from installed_example import install_example
from processes import run_process

if TYPE_CHECKING:
    import subprocess

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "data" / "checkpoints" / "gptq-2bit-64g-noact-sym"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example is installed, beside the packages of this one."""
    return install_example("my_host", tmp_path_factory.mktemp("example"))


def run(
    *arguments: str, env: dict[str, str], cwd: Path, text: str = ""
) -> subprocess.CompletedProcess[str]:
    return run_process([sys.executable, *arguments], env=env, cwd=cwd, input=text)


def test_it_is_listed_with_where_it_comes_from(installed: dict[str, str], tmp_path: Path) -> None:
    completed = run("-m", "gptq_loader_plugin", "plugins", "--json", env=installed, cwd=tmp_path)
    hosts = {it["name"]: it for it in json.loads(completed.stdout)["hosts"]}
    assert hosts["json-lines"] == {
        "name": "json-lines",
        "works": True,
        "detail": "standard input and output; one JSON object a line",
        "plugin": "my-host",
        "distribution": "my-gptq-host",
        "version": "0.1.0",
    }


def test_it_answers_each_line_and_goes_on_after_an_error(
    installed: dict[str, str], tmp_path: Path
) -> None:
    requests = [
        '{"prompt": "hi", "max_new_tokens": 4, "temperature": 0}',
        '{"prompt": "hi", "temprature": 0}',
        "hi",
        '{"prompt": "hi", "max_new_tokens": 2, "temperature": 0}',
    ]
    completed = run(
        "-m", "my_gptq_host", str(CHECKPOINT), env=installed, cwd=tmp_path, text="\n".join(requests)
    )
    assert completed.returncode == 0, completed.stderr
    first, misspelt, no_json, last = (json.loads(it) for it in completed.stdout.splitlines())
    assert first["tokens"] == 4
    assert first["text"].startswith(last["text"])
    assert "temprature" in misspelt["error"]
    assert no_json["hint"] == 'send {"prompt": "..."} on a line'


def test_importing_it_imports_no_torch(installed: dict[str, str], tmp_path: Path) -> None:
    code = "import sys, my_gptq_host; print('torch' in sys.modules)"
    assert run("-c", code, env=installed, cwd=tmp_path).stdout == "False\n"
