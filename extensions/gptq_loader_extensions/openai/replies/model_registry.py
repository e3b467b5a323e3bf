"""Hold one model, and put another in its place when a request names it.

A name is looked up in a list and never used as a path: whatever is not in the list, does not exist.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

from gptq_loader_extensions.openai.errors import ApiError
from gptq_loader_plugin.catalog.local import local_models
from gptq_loader_plugin.errors import NotEnoughMemory
from gptq_loader_plugin.hub.hub_reference import parse_hub_reference
from gptq_loader_plugin.planning.memory import check_memory
from gptq_loader_plugin.reference import models_folders
from gptq_loader_plugin.system.paths import local_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_extensions.openai.settings import Settings
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.hub.hub_reference import HubReference

__all__ = ["Entry", "ModelRegistry"]

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that may be served.

    Attributes:
        name: what clients call it.
        target: what loads it: a folder, or what the server was started with.
        created: when its folder last changed, in seconds since 1970.
    """

    name: str
    target: str | Path
    created: int


class ModelRegistry:
    """The models that may be served by name, and the one that is loaded.

    Args:
        settings: which folders, and whether the cache, downloads and pickles are allowed.
        load: loads what an entry points at.
        environ: where `GPTQ_LOADER_MODELS` is looked up.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        load: Callable[[str | Path], LoadedModel],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._settings = settings
        self._load = load
        self._environ = dict(environ)
        if settings.models_dir is not None:
            self._environ["GPTQ_LOADER_MODELS"] = str(settings.models_dir)
        self._own: Entry | None = None
        self._loaded: tuple[str, LoadedModel] | None = None
        self._last: str | None = None
        self._spare: PreTrainedTokenizerBase | None = None
        self._spare_lock = Lock()
        self._warned: set[Path] = set()

    def start(self, reference: str | None, model: LoadedModel | None) -> None:
        """Put the first model up: one that is loaded already, or the one a user named.

        Raises:
            GPTQLoaderError: it cannot be loaded.
        """
        if model is None and reference is not None:
            self._own = next((it for it in self.entries() if it.name == reference), None)
            model = self._load(reference if self._own is None else self._own.target)
        if model is not None:
            self._own = self._own or _own_entry(model, reference)
            self._put(self._own.name, model)

    @property
    def own(self) -> Entry | None:
        """What the server was started with."""
        return self._own

    @property
    def loaded(self) -> tuple[str, LoadedModel] | None:
        """The model in memory, and its name."""
        return self._loaded

    def entries(self) -> list[Entry]:
        """List the models that may be served: the one the server was started with comes first."""
        found = {} if self._own is None else {self._own.name: self._own}
        roots = [it.resolve() for it in models_folders(self._environ)]
        cache = _cache_root()
        for local in local_models(cache=self._settings.cached_models, environ=self._environ):
            if self._stays_inside(local.path, [*roots, cache]) and self._readable(local.path):
                entry = Entry(local.name, local.path, int(local.path.stat().st_mtime))
                found.setdefault(local.name, entry)
        return list(found.values())

    def known(self, name: str | None) -> str:
        """Give the name that a model goes by.

        Args:
            name: what a client calls it; None means the model that is loaded, or was last.

        Raises:
            ApiError: there is no such model, or none was ever loaded.
        """
        if self._loaded is not None and name in (None, self._loaded[0]):
            return self._loaded[0]
        found = self._find(name)
        return found.name if isinstance(found, Entry) else _hub_name(found)

    def take(
        self, name: str | None, *, cancelled: Callable[[], bool] | None = None
    ) -> tuple[str, LoadedModel]:
        """Give a model, loading it where another one is loaded; call it from one thread alone.

        Args:
            name: what a client calls it; None means the one that is loaded, or was last.
            cancelled: asked while it is downloaded: nobody else is answered meanwhile.

        Raises:
            ApiError: there is no such model, or not enough memory for it.
            GPTQLoaderError: it cannot be loaded.
        """
        if self._loaded is not None and name in (None, self._loaded[0]):
            return self._loaded
        found = self._find(name)
        entry = found if isinstance(found, Entry) else self._download(found, cancelled)
        self._check_memory(entry)
        self.unload()
        return self._put(entry.name, self._load(entry.target))

    def with_tokenizer(self, use: Callable[[PreTrainedTokenizerBase], T]) -> T:
        """Have a function called with a tokenizer that is the model's, and not in use elsewhere.

        Tokenizers keep the options of a call inside them: two threads cannot share one.
        """
        with self._spare_lock:
            if self._spare is None:
                raise ApiError(503, "no model is loaded", kind="server_error")
            return use(self._spare)

    def exchange(self, name: str, load: Callable[[], LoadedModel]) -> LoadedModel:
        """Put a model in place of the one that is loaded; call it from the engine's thread alone.

        Raises:
            GPTQLoaderError: it cannot be loaded; then none is.
        """
        self.unload()
        return self._put(name, load())[1]

    def unload(self) -> None:
        """Free the memory of the model that is loaded."""
        if self._loaded is None:
            return
        (_, model), self._loaded = self._loaded, None
        model.close()
        del model
        gc.unfreeze()
        self.tidy()

    def tidy(self) -> None:
        """Give back what requests have left: their bodies in errors' cycles, pages with glibc.

        Python looks through all objects for cycles only when their number has grown by a quarter,
        and there are a million; those of the libraries and the model are left out (`_put`).
        """
        from gptq_loader_plugin.system.heap import release_freed

        gc.collect()
        release_freed()

    def forget(self) -> None:
        """Free what a failed request left in memory."""
        if self._loaded is not None:
            self._loaded[1].forget()
        gc.collect()

    def close(self) -> None:
        """Free everything."""
        self.unload()

    def _put(self, name: str, model: LoadedModel) -> tuple[str, LoadedModel]:
        spare = copy.deepcopy(model.tokenizer)
        with self._spare_lock:
            self._spare = spare
        self._loaded, self._last = (name, model), name
        self.tidy()
        gc.freeze()
        return self._loaded

    def _find(self, name: str | None) -> Entry | HubReference:
        """Look a name up; what is not listed may be on the hub, where downloads are allowed."""
        wanted = self._last if name is None else name
        entries = self.entries()
        if wanted is None:
            names = ", ".join(it.name for it in entries) or "there is none on this machine"
            raise ApiError(400, f"name a model: {names}", param="model", code="model_required")
        for entry in entries:
            if entry.name == wanted:
                return entry
        hub = parse_hub_reference(wanted) if self._settings.downloads else None
        if hub is None:
            raise ApiError(
                404,
                f"the model {wanted[:200]!r} does not exist here; GET /v1/models lists those that "
                "do",
                param="model",
                code="model_not_found",
            )
        return hub

    def _download(self, hub: HubReference, cancelled: Callable[[], bool] | None) -> Entry:
        from gptq_loader_plugin.hub import download_folder

        name = _hub_name(hub)
        folder = download_folder(hub, progress=lambda _: None, cancelled=cancelled)
        if not self._readable(folder):
            raise ApiError(
                403,
                f"the weights of {name} are pickles, which this server does not open; start it "
                "with --allow-pickle, or name a model of .safetensors files",
                param="model",
                code="model_refused",
            )
        return Entry(name, folder, int(folder.stat().st_mtime))

    def _stays_inside(self, folder: Path, roots: list[Path]) -> bool:
        """Whether a model's folder and all of its files lie in the folders that may be read."""
        for path in (folder, *folder.iterdir()):
            real = path.resolve()
            if any(real.is_relative_to(root) for root in roots):
                continue
            if path not in self._warned:
                logger.warning("%s points outside the models folders and is not served", path)
                self._warned.add(path)
            return False
        return True

    def _readable(self, folder: Path) -> bool:
        return self._settings.pickles or any(it.suffix == ".safetensors" for it in folder.iterdir())

    def _check_memory(self, entry: Entry) -> None:
        """Refuse a model that would not fit, before the system ends this process for it."""
        import gptq_loader_plugin as gptq

        replaced = None if self._loaded is None else self._loaded[1].plan
        try:
            check_memory(entry.name, gptq.explain(entry.target), replaced=replaced)
        except NotEnoughMemory as error:
            raise ApiError(503, error.message, kind="server_error", code="out_of_memory") from error


def _own_entry(model: LoadedModel, reference: str | None) -> Entry:
    """Name the model the server was started with: never by a path."""
    plan = model.plan
    typed = reference or plan.reference
    is_path = local_path(typed).exists()
    name = plan.path.resolve().name if is_path else typed
    target = plan.path if is_path else typed
    return Entry(name, target, int(plan.path.stat().st_mtime))


def _hub_name(hub: HubReference) -> str:
    return hub.repo if hub.branch == "main" else f"{hub.repo}:{hub.branch}"


def _cache_root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()
