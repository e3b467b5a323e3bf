"""List the models a page may load: names only, so that no path ever comes from a browser."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.catalog.local import local_models
from gptq_loader_plugin.errors import CheckpointNotFound
from gptq_loader_plugin.reference import models_folders
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptq_loader_plugin.catalog.local import LocalModel

__all__ = ["Catalog", "CatalogEntry"]

DEMO = "demo"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """A model that may be loaded.

    Attributes:
        name: what a person calls it, with its branch.
        target: what to load: a folder, or "demo".
        label: the name, with its size and where it lies.
        adapters: the LoRA adapters to load beside it, by name; a browser never names their folders.
    """

    name: str
    target: str | Path
    label: str
    adapters: Mapping[str, Path] = field(default_factory=dict)


class Catalog:
    """The models of this machine, by name.

    Args:
        models_dir: the folder whose folders are models; None for the usual ones.
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
        self._first: CatalogEntry | None = None

    def add(
        self, name: str, target: str | Path, adapters: Mapping[str, Path] | None = None
    ) -> None:
        """List the model that the page was started with too, wherever it is, and its adapters."""
        self._first = CatalogEntry(name, target, name, adapters or {})

    def folders(self) -> list[Path]:
        """Return the folders whose folders are models."""
        return models_folders(self._environ)

    def download_folder(self, name: str) -> Path | None:
        """Return where a download goes to be listed: a folder, or None for the hub's cache."""
        return None if self._cache else self.folders()[0] / name

    def entries(self) -> list[CatalogEntry]:
        """List the models: those of the models directories, of the cache, and the demo."""
        roots = [folder.resolve() for folder in self.folders()]
        if self._cache:
            roots.append(_cache_root())
        entries: dict[str, CatalogEntry] = {}
        for model in local_models(cache=self._cache, environ=self._environ):
            if _stays_inside(model.path, roots):
                entries[model.name] = CatalogEntry(model.name, model.path, _label(model))
        entries.setdefault(DEMO, CatalogEntry(DEMO, DEMO, "demo (SmolLM2-135M-Instruct, 4-bit)"))
        first = self._first
        if first is not None and entries.get(first.name, first).target != first.target:
            del entries[first.name]  # another model of the name that the page was started with
        if first is not None:
            listed = entries.setdefault(first.name, first)
            entries[first.name] = replace(listed, adapters=first.adapters)
        return list(entries.values())

    def others(self) -> list[str]:
        """List the folders of the models directories that hold no checkpoint of ours."""
        listed = {Path(entry.target).resolve() for entry in self.entries()}
        return [
            folder.name
            for root in self.folders()
            if root.is_dir()
            for folder in sorted(root.iterdir())
            if folder.is_dir()
            and not folder.name.startswith(".")
            and not any(
                path == folder.resolve() or folder.resolve() in path.parents for path in listed
            )
        ]

    def find(self, name: str) -> CatalogEntry:
        """Look up a name.

        Raises:
            CheckpointNotFound: no model in the list has it.
        """
        for entry in self.entries():
            if entry.name == name:
                return entry
        raise CheckpointNotFound(
            f"the model {name[:200]!r} is no longer here",
            reference=name,
            tried=[str(folder) for folder in self.folders()],
            hint="press Refresh, and choose another one",
        )


def _label(model: LocalModel) -> str:
    """Format a model as a line of a list, with its branch where there are branches."""
    cached = model.source == "Hugging Face cache"
    name = f"{model.name}:main" if cached and ":" not in model.name else model.name
    source = ", Hugging Face cache" if cached else ""
    return f"{name} ({write_size(model.size_bytes)}{source})"


def _cache_root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()


def _stays_inside(folder: Path, roots: list[Path]) -> bool:
    """Return whether a model's folder and all of its files are in folders that may be read."""
    for path in (folder, *folder.iterdir()):
        real = path.resolve()
        if not any(real.is_relative_to(root) for root in roots):
            logger.warning("%s points outside the models directories and is not listed", path)
            return False
    return True
