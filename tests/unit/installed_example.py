"""Install an example as its readers would, beside the packages of this environment."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from processes import run_process

ROOT = Path(__file__).parents[2]


def install_example(name: str, folder: Path) -> dict[str, str]:
    """Install examples/NAME into an empty folder; return an environment that has it."""
    source = folder / "source"
    shutil.copytree(ROOT / "examples" / name, source, ignore=shutil.ignore_patterns("*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--target", folder / "site"]
    run_process([*pip, *options, source], check=True)
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
