"""Everything of vLLM that this package uses is in the installed one, and in that of VLLM_SOURCE.

vLLM promises none of it, and a name that moves would make the plug-in step aside with a warning, or
worse. Another version needs nothing compiled for this: its wheel's Python files are enough.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from environments import ROOT, needs_python_of
from vllm_process import run_in_vllm
from vllm_versions import BOTH, folder_of

pytestmark = [
    pytest.mark.host("vllm"),
    pytest.mark.timeout(1800),  # seconds: a start alone may take ten minutes
    needs_python_of("vllm"),
]

CONTRACT = Path(__file__).parent / "vllm_contract.py"
OURS = ROOT / "extensions" / "gptq_loader_extensions" / "vllm"


def missing(folder: Path, *expected: str, version: str = "installed") -> list[str]:
    """List what vLLM lacks."""
    completed = run_in_vllm(CONTRACT, str(folder), *expected, environ={}, vllm=folder_of(version))
    lines = completed.stdout.splitlines()
    assert any(line.startswith("CHECKED vLLM") for line in lines), completed.stderr
    return [line.removeprefix("MISSING ") for line in lines if line.startswith("MISSING ")]


@pytest.mark.parametrize("version", BOTH)
def test_everything_that_is_used_is_there(version: str) -> None:
    lacking = missing(OURS, version=version)
    assert not lacking, "\n".join(lacking)


def test_what_moved_is_named(tmp_path: Path) -> None:
    imports = "from vllm.config import VllmConfig, moved\nfrom vllm.moved import name\n"
    (tmp_path / "ours.py").write_text(imports)
    assert missing(tmp_path, "vllm.config:VllmConfig.moved") == [
        "vllm.config:moved, imported in ours.py:1",
        "vllm.moved:name, imported in ours.py:2",
        "vllm.config:VllmConfig.moved: moved is no attribute",
    ]
