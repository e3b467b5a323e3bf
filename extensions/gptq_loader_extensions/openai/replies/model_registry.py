"""Hold one model, and load another in its place when a request names it.

A name is looked up in a list and never used as a path: a name that is not listed does not exist.
"""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_extensions.openai.errors import ApiError
from gptq_loader_extensions.openai.replies.prompt_tokenizer import prompt_models
from gptq_loader_plugin.catalog.local import local_models
from gptq_loader_plugin.errors import NotEnoughMemory, OptionInvalid
from gptq_loader_plugin.hub.hub_reference import parse_hub_reference
from gptq_loader_plugin.planning.memory import check_memory
from gptq_loader_plugin.reference import models_folders
from gptq_loader_plugin.system.paths import local_path

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gptq_loader_extensions.openai.settings import Settings
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.hub.hub_reference import HubReference

__all__ = ["ModelRegistry", "ServedModel"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that may be served.

    Attributes:
        name: what clients call it.
        target: the folder to load, or the reference the server was started with.
        created: when its folder last changed, in seconds since 1970.
        parent: the model that this is an adapter of; None for a model.
        size_bytes: what its weight files take on disk.
    """

    name: str
    target: str | Path
    created: int
    parent: str | None = None
    size_bytes: int = 0


class ModelRegistry:
    """The models that may be served by name, and the one that is loaded.

    Args:
        settings: which folders, and whether the cache, downloads and pickles are allowed.
        load: loads a model's target.
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
        self._initial: ServedModel | None = None
        self._adapters: tuple[ServedModel, ...] = ()  # of the initial model
        self._loaded: tuple[str, LoadedModel] | None = None
        self._last_name: str | None = None
        self._prompt_models: tuple[str, tuple[LoadedModel, ...]] | None = None
        self._warned: set[Path] = set()

    def load_initial(self, reference: str | None, model: LoadedModel | None) -> None:
        """Load the first model, by its reference; or take one that is loaded already.

        Raises:
            GPTQLoaderError: it cannot be loaded.
        """
        if model is None and reference is not None:
            listed = (entry for entry in self.list_models() if entry.name == reference)
            self._initial = next(listed, None)
            model = self._load(reference if self._initial is None else self._initial.target)
        if model is not None:
            self._initial = self._initial or _describe(model, reference)
            self._adapters = _list_adapters(model, self._initial, self.list_models())
            self._set_loaded(self._initial.name, model)

    @property
    def initial(self) -> ServedModel | None:
        """The model that the server was started with."""
        return self._initial

    @property
    def loaded(self) -> tuple[str, LoadedModel] | None:
        """The model in memory, and its name."""
        return self._loaded

    @property
    def prompt_models(self) -> tuple[str, tuple[LoadedModel, ...]] | None:
        """The loaded model's name, and the model for each of the threads that make prompts."""
        return self._prompt_models

    def list_models(self) -> list[ServedModel]:
        """List the models that may be served: the one the server was started with comes first."""
        models = {} if self._initial is None else {self._initial.name: self._initial}
        models |= {adapter.name: adapter for adapter in self._adapters}
        roots = [folder.resolve() for folder in models_folders(self._environ)]
        cache = _cache_root()
        for local in local_models(cache=self._settings.cached_models, environ=self._environ):
            if self._stays_inside(local.path, [*roots, cache]) and self._readable(local.path):
                created = int(local.path.stat().st_mtime)
                model = ServedModel(local.name, local.path, created, size_bytes=local.size_bytes)
                models.setdefault(local.name, model)
        return list(models.values())

    def resolve_name(self, name: str | None) -> str:
        """Return the name under which a model is served.

        Args:
            name: what a client calls it; None means the model that is loaded, or was last.

        Raises:
            ApiError: there is no such model, or none was ever loaded.
        """
        if self._loaded is not None and name in (None, self._loaded[0]):
            return self._loaded[0]
        model = self._look_up(name)
        if isinstance(model, ServedModel) and model.parent is not None:
            return model.parent
        return model.name if isinstance(model, ServedModel) else _hub_name(model)

    def adapter_named(self, name: str | None) -> str | None:
        """Return a name where it is that of an adapter."""
        return next((it.name for it in self._adapters if it.name == name), None)

    def load(
        self, name: str | None, *, cancelled: Callable[[], bool] | None = None
    ) -> tuple[str, LoadedModel]:
        """Load a model in place of another one, unless it is the one that is loaded.

        Call it from the engine's thread alone.

        Args:
            name: what a client calls it; None means the one that is loaded, or was last.
            cancelled: polled while it is downloaded, as all other requests wait for that.

        Raises:
            ApiError: there is no such model, or not enough memory for it.
            GPTQLoaderError: it cannot be loaded.
        """
        if self._loaded is not None and name in (None, self._loaded[0]):
            return self._loaded
        model = self._look_up(name)
        if not isinstance(model, ServedModel):
            model = self._download(model, cancelled)
        self._check_memory(model)
        self.unload()
        return self._set_loaded(model.name, self._load(model.target))

    def load_with(self, name: str, load: Callable[[], LoadedModel]) -> LoadedModel:
        """Load a model by a function, in place of the one that is loaded.

        Call it from the engine's thread alone.

        Raises:
            GPTQLoaderError: it cannot be loaded; then none is.
        """
        self.unload()
        return self._set_loaded(name, load())[1]

    def unload(self) -> None:
        """Free the memory of the model that is loaded."""
        if self._loaded is None:
            return
        (_, model), self._loaded, self._prompt_models = self._loaded, None, None
        model.close()
        del model
        gc.unfreeze()
        self.release_memory()

    def release_memory(self, *, caches: bool = False) -> None:
        """Return to the system what requests left behind: bodies in errors' cycles, freed pages.

        Python looks through all objects for cycles only when their number has grown by a quarter,
        and there are a million; those of the libraries and the model are frozen (`_set_loaded`).

        Args:
            caches: also drop the keys and values that are kept for a next turn.
        """
        from gptq_loader_plugin.system.heap import release_freed

        if caches and self._loaded is not None:
            self._loaded[1].forget()
        gc.collect()
        release_freed()

    def _set_loaded(self, name: str, model: LoadedModel) -> tuple[str, LoadedModel]:
        self._prompt_models = name, prompt_models(model)
        self._loaded, self._last_name = (name, model), name
        self.release_memory()
        gc.freeze()
        return self._loaded

    def _look_up(self, name: str | None) -> ServedModel | HubReference:
        """Look a name up; one that is not listed may be on the hub, where downloads are allowed."""
        name = self._last_name if name is None else name
        models = self.list_models()
        if name is None:
            names = ", ".join(it.name for it in models) or "there is none on this machine"
            raise ApiError(400, f"name a model: {names}", param="model", code="model_required")
        for model in models:
            if model.name == name:
                return model
        hub = parse_hub_reference(name) if self._settings.downloads else None
        if hub is None:
            raise ApiError(
                404,
                f"the model {name[:200]!r} does not exist here; GET /v1/models lists those that do",
                param="model",
                code="model_not_found",
            )
        return hub

    def _download(self, hub: HubReference, cancelled: Callable[[], bool] | None) -> ServedModel:
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
        return ServedModel(name, folder, int(folder.stat().st_mtime))

    def _stays_inside(self, folder: Path, roots: list[Path]) -> bool:
        """Return whether a model's folder and all of its files are in folders that may be read."""
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
        return self._settings.pickles or any(
            file.suffix == ".safetensors" for file in folder.iterdir()
        )

    def _check_memory(self, model: ServedModel) -> None:
        """Refuse a model that would not fit, before the system kills this process for it."""
        import gptq_loader_plugin as gptq

        replaced = None if self._loaded is None else self._loaded[1].plan
        try:
            check_memory(model.name, gptq.explain(model.target), replaced=replaced)
        except NotEnoughMemory as error:
            raise ApiError(503, error.message, kind="server_error", code="out_of_memory") from error


def _list_adapters(
    model: LoadedModel, parent: ServedModel, listed: list[ServedModel]
) -> tuple[ServedModel, ...]:
    """List a model's adapters, each under a name that no model has.

    Raises:
        OptionInvalid: a model has that name.
    """
    names = [] if model.adapters is None else list(model.adapters.updates)
    taken = {it.name for it in listed}
    for name in names:
        if name in taken:
            raise OptionInvalid(
                f"the adapter {name} has the name of a model that is served",
                hint="name it otherwise: --lora NAME=REF",
            )
    return tuple(replace(parent, name=name, parent=parent.name) for name in names)


def _describe(model: LoadedModel, reference: str | None) -> ServedModel:
    """Name the model that the server was started with, never by a path."""
    plan = model.plan
    reference = reference or plan.reference
    is_path = local_path(reference).exists()
    name = plan.path.resolve().name if is_path else reference
    target = plan.path if is_path else reference
    created = int(plan.path.stat().st_mtime)
    return ServedModel(name, target, created, size_bytes=plan.checkpoint_bytes)


def _hub_name(hub: HubReference) -> str:
    return hub.repo if hub.branch == "main" else f"{hub.repo}:{hub.branch}"


def _cache_root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()
