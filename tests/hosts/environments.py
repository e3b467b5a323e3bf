"""Find the Python of a host's environment, as `make hosts` sets it up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

__all__ = ["ROOT", "branches", "needs_python_of", "python_of"]

ROOT = Path(__file__).parents[2]


def python_of(name: str) -> Path | None:
    """Find the Python of the environment `name`: GPTQ_HOST_PYTHON_NAME, else .venvs/NAME."""
    variable = f"GPTQ_HOST_PYTHON_{name.upper().replace('-', '_')}"
    named = os.environ.get(variable)
    folder = "Scripts" if os.name == "nt" else "bin"
    python = Path(named) if named else ROOT / ".venvs" / name / folder / "python"
    return python if python.exists() else None


def needs_python_of(name: str) -> pytest.MarkDecorator:
    """Skip a test, or a module (`pytestmark = ...`), where the environment `name` is absent."""
    return pytest.mark.skipif(
        python_of(name) is None, reason=f"no environment {name}; make hosts sets it up"
    )


def branches() -> list[Path]:
    """List SmolLM2's six branches, where they are: GPTQ_BRANCHES, else build/branches."""
    folder = Path(os.environ.get("GPTQ_BRANCHES") or ROOT / "build" / "branches")
    return sorted(it for it in folder.glob("*") if (it / "quantize_config.json").is_file())
