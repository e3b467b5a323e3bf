"""Make this package importable where it is not installed: from its tree, and wheels beside it.

A bare machine has Python, torch, Triton and transformers, and no network. What else is needed lies
in build/wheels (tools/gpu_bundle.py). Nothing is installed: what is missing is unpacked into a
folder, beside links to the tree's packages and the entry points that pyproject.toml names. Imports
the standard library alone.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

__all__ = ["ROOT", "WHEELS", "make_importable"]

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "build" / "wheels"
PACKAGES = (
    ROOT / "gptq_loader_plugin",
    ROOT / "kernels" / "gptq_loader_kernels",
    ROOT / "extensions" / "gptq_loader_extensions",
)
OURS = "gptq-loader-plugin"


def make_importable(site: Path, *, wheels: Path = WHEELS) -> list[str]:
    """Make what is missing importable, here and in processes that are started from here.

    Args:
        site: a folder for it; it is made.
        wheels: the folder of wheels.

    Returns:
        The distributions that were taken from the tree and the wheels.
    """
    taken = []
    for wheel in sorted(wheels.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        unpacked = site / f"{name}-{version}.dist-info"
        if unpacked.is_dir() or not _installed(name):
            taken.append(f"{name} {version}")
        if not unpacked.is_dir() and not _installed(name):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
    if not _installed(OURS):
        taken.insert(0, OURS)
        _link_tree(site)
    if taken:
        sys.path.insert(0, str(site))
        others = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join((str(site), *([others] if others else [])))
    return taken


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def _link_tree(site: Path) -> None:
    """Link to the packages of the tree, and write the entry points by which plugins are found."""
    site.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        link = site / package.name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(package)
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    name = re.sub(r"\W", "_", project["name"])
    about = site / f"{name}-{project['version']}.dist-info"
    about.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (about / "METADATA").write_text(metadata, encoding="utf-8")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
