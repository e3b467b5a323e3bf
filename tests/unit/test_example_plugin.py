"""`examples/my_kernel`, installed as its readers would, is found, conforms and answers."""

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
EIGHT_BITS = ROOT / "tests" / "data" / "checkpoints" / "gptq-8bit-128g-act-sym"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example is installed, beside the packages of this one."""
    return install_example("my_kernel", tmp_path_factory.mktemp("example"))


def run(*arguments: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_process([sys.executable, *arguments], env=env, cwd=cwd)


def test_it_is_listed(installed: dict[str, str], tmp_path: Path) -> None:
    completed = run("-m", "gptq_loader_plugin", "plugins", "--json", env=installed, cwd=tmp_path)
    listed = json.loads(completed.stdout)
    kernels = {it["name"]: it for it in listed["kernels"]}
    assert kernels["int8rows"]["distribution"] == "my-gptq-kernel"
    assert kernels["int8rows"]["works"]
    assert kernels["int8rows"]["detail"].startswith("8 bits on ")
    assert "plain" in [it["name"] for it in listed["templates"]]


def test_its_kernel_conforms(installed: dict[str, str], tmp_path: Path) -> None:
    suite = ("-m", "pytest", "--pyargs", "gptq_loader_plugin.conformance", "-q", "-W", "error")
    completed = run(*suite, "--kernel", "int8rows", env=installed, cwd=tmp_path)
    assert completed.returncode == 0, completed.stdout
    assert "passed" in completed.stdout
    assert "this takes 8-bit only" not in completed.stderr


def test_it_answers(installed: dict[str, str], tmp_path: Path) -> None:
    command = ("-m", "gptq_loader_plugin", "generate", str(EIGHT_BITS), "--prompt", "hi", "--json")
    options = ("--backend", "int8rows", "--template", "plain", "--max-new-tokens", "4")
    completed = run(*command, *options, env=installed, cwd=tmp_path)
    assert completed.returncode == 0, completed.stderr
    reply = json.loads(completed.stdout)
    assert reply["kernels"] == {"int8rows": 14}
    assert reply["template"] == "plain"


def test_its_refusal_is_said(installed: dict[str, str], tmp_path: Path) -> None:
    four_bits = str(EIGHT_BITS.with_name("gptq-4bit-128g-act-sym"))
    completed = run(
        "-m", "gptq_loader_plugin", "explain", four_bits, "--backend", "int8rows",
        env=installed, cwd=tmp_path,
    )  # fmt: skip
    assert completed.returncode == 1
    assert "4-bit; this takes 8-bit only" in completed.stderr
