"""The vLLMs to test: the installed one, and the Python files of another one.

VLLM_SOURCE names a folder with another version's `vllm/`: its wheel, unzipped, or its repository.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest
from environments import python_of
from processes import run_process

SOURCE = Path(os.environ["VLLM_SOURCE"]).resolve() if os.environ.get("VLLM_SOURCE") else None
BOTH = [
    pytest.param("installed", id="installed"),
    pytest.param(
        "source",
        id="source",
        marks=pytest.mark.skipif(SOURCE is None, reason="VLLM_SOURCE names no other vLLM"),
    ),
]


def folder_of(version: str) -> Path | None:
    """Return the folder to put before the installed vLLM; None for the installed one."""
    return SOURCE if version == "source" else None


@cache
def installed_package() -> Path:
    """Return the folder of the installed vLLM's package, without importing it."""
    code = "import importlib.util as u; print(u.find_spec('vllm').submodule_search_locations[0])"
    completed = run_process([str(python_of("vllm")), "-P", "-c", code], check=True)
    return Path(completed.stdout.strip())


def link_with_compiled_parts(folder: Path) -> Path:
    """Link the other vLLM's Python files beside the installed one's compiled modules, for a CPU.

    Nothing is faked: Python of the one calls operators of the other, as far as those are the same.
    """
    assert SOURCE is not None
    package = folder / "vllm"
    package.mkdir(parents=True)
    for file in (SOURCE / "vllm").iterdir():
        if file.suffix != ".so":
            (package / file.name).symlink_to(file)
    for file in installed_package().glob("*.so"):
        (package / file.name).symlink_to(file)
    return folder
