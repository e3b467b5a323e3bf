"""List the models a page may load: names only, so that no path is ever taken from a browser."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.catalog.local import local_models
from gptq_loader_plugin.errors import CheckpointNotFound
from gptq_loader_plugin.reference import models_folders
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptq_loader_plugin.catalog.local import LocalModel

__all__ = ["Catalog", "Entry"]

DEMO = "demo"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that may be loaded.

    Attributes:
        name: what a person calls it, branch and all.
        target: what loads it: a folder, or "demo".
        label: the name, with its size and where it lies.
    """

    name: str
    target: str | Path
    label: str


class Catalog:
    """The models of this machine, by name.

    Args:
        models_dir: the folder whose folders are models; None takes the usual ones.
        cache: whether models of the Hugging Face cache are listed.
        environ: where `GPTQ_LOADER_MODELS` is looked up.
    """

    def __init__(
        self,
        *,
        models_dir: Path | None = None,
        cache: bool = True,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._cache = cache
        self._environ = dict(environ)
        if models_dir is not None:
            self._environ["GPTQ_LOADER_MODELS"] = str(models_dir)
        self._first: Entry | None = None

    def add(self, name: str, target: str | Path) -> None:
        """List what the page was started with too, wherever it lies."""
        self._first = Entry(name, target, name)

    def folders(self) -> list[Path]:
        """Give the folders whose folders are models."""
        return models_folders(self._environ)

    def place_for(self, name: str) -> Path | None:
        """Say where a download goes to be listed: a folder, or None for the hub's cache."""
        return None if self._cache else self.folders()[0] / name

    def entries(self) -> list[Entry]:
        """List the models: those of the models directories, of the cache, and the demo."""
        roots = [it.resolve() for it in self.folders()]
        if self._cache:
            roots.append(_cache_root())
        found: dict[str, Entry] = {}
        for model in local_models(cache=self._cache, environ=self._environ):
            if _stays_inside(model.path, roots):
                found[model.name] = Entry(model.name, model.path, _label(model))
        found.setdefault(DEMO, Entry(DEMO, DEMO, "demo (SmolLM2-135M-Instruct, 4-bit)"))
        first = self._first
        if first is not None and found.get(first.name, first).target != first.target:
            del found[first.name]  # another model of that name: the page was started with this one
        if first is not None:
            found.setdefault(first.name, first)
        return list(found.values())

    def find(self, name: str) -> Entry:
        """Look a name up.

        Raises:
            CheckpointNotFound: no model of the list has it.
        """
        for entry in self.entries():
            if entry.name == name:
                return entry
        raise CheckpointNotFound(
            f"there is no model {name[:200]!r} here any more",
            reference=name,
            tried=[str(it) for it in self.folders()],
            hint="press Refresh, and choose another",
        )


def _label(model: LocalModel) -> str:
    """Write a model as a line of a list; the branch is said where there are branches."""
    cached = model.source == "Hugging Face cache"
    name = f"{model.name}:main" if cached and ":" not in model.name else model.name
    where = ", Hugging Face cache" if cached else ""
    return f"{name} ({write_size(model.size_bytes)}{where})"


def _cache_root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()


def _stays_inside(folder: Path, roots: list[Path]) -> bool:
    """Whether a model's folder and all of its files lie in the folders that may be read."""
    for path in (folder, *folder.iterdir()):
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in roots):
            logger.warning("%s points outside the models directories and is not listed", path)
            return False
    return True
