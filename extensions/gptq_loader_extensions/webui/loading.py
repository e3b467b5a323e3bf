"""Load a checkpoint for the host as it is set, and give the memory back when it unloads."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.webui.host_modules import NAME, TRANSFORMERS, is_ours
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.system.patch import Patch, patch_imports

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gptq_loader_extensions.webui.host_modules import Webui
    from gptq_loader_plugin.events import Progress
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["Loads", "option", "wrap_unload"]

AUTO = "auto"
SECONDS_OF_SILENCE = 5.0


class Loads:
    """The host's `load_model`, which hands GPTQ checkpoints to us.

    Its own is still what runs: it sees the loader Transformers, whose place we take for the length
    of a load, so that its settings, samplers and log stay its own.

    Args:
        webui: the host's modules.
        before: called before each of our loads.

    Attributes:
        failed: why the last load of ours failed, or None.
    """

    def __init__(self, webui: Webui, *, before: Callable[[], None]) -> None:
        self.failed: GPTQLoaderError | None = None
        self._webui = webui
        self._before = before
        self._theirs = webui.models.load_model
        self._their_transformers = webui.models.transformers_loader
        self._ours = threading.local()

    def patches(self) -> list[Patch]:
        """Make the patches that let the host load by this."""
        logger = self._webui.logger
        return [
            Patch(self._webui.models, "transformers_loader", self._transformers),
            Patch(logger, "filters", [*logger.filters, self._true_name]),
            *patch_imports(self._theirs, self.load_model),
        ]

    def load_model(self, model_name: str, loader: str | None = None) -> Any:  # noqa: ANN401 - a model and a tokenizer
        """Load with our loader where that is what is set, with the host's own otherwise."""
        shared = self._webui.shared
        wanted = loader if loader is not None else shared.args.loader
        if wanted is None:
            wanted = self._webui.models_settings.get_model_metadata(model_name)["loader"]
        if not is_ours(wanted):
            return self._theirs(model_name, loader)
        self._before()
        self.failed = None
        self._ours.loading = True
        try:
            loaded = self._theirs(model_name, TRANSFORMERS)
        except GPTQLoaderError as error:
            self.failed = error.with_traceback(None)  # whose frames hold what was loaded so far
            self._webui.logger.error("Cannot load %s: %s\nhint: %s", model_name, error, error.hint)  # noqa: TRY400 - words, and no traceback
            if shared.generation_lock is None:  # at start-up: the program goes on without a model
                shared.model_name = "None"
                return None, None
            error.add_note(f"hint: {error.hint}")
            raise error from None
        finally:
            self._ours.loading = False
            shared.args.loader = NAME
        shared.settings.update(self._ours.settings)  # over those the host takes from metadata
        return loaded

    def _transformers(self, model_name: str) -> Any:  # noqa: ANN401 - a model and a tokenizer
        if not getattr(self._ours, "loading", False):
            return self._their_transformers(model_name)
        loaded, self._ours.settings = load(
            self._webui, self._webui.utils.resolve_model_path(model_name)
        )
        return loaded.model, loaded.tokenizer

    def _true_name(self, record: Any) -> bool:  # noqa: ANN401 - a log record
        """Name the loader that loads, in the line where the host names the one it knows."""
        if record.msg == f'LOADER: "{TRANSFORMERS}"' and getattr(self._ours, "loading", False):
            record.msg = f'LOADER: "{NAME}"'
        return True


class _Progress:
    """Say now and then how far a long load has come.

    Args:
        logger: the host's.
    """

    def __init__(self, logger: Any) -> None:  # noqa: ANN401 - the host's
        self._logger = logger
        self._said = time.monotonic()

    @hookimpl
    def gptq_progress(self, progress: Progress) -> None:
        """Hear how far it is."""
        if progress.total and time.monotonic() - self._said > SECONDS_OF_SILENCE:
            self._said = time.monotonic()
            self._logger.info("%s: %d %%", progress.stage, 100 * progress.done // progress.total)


def load(webui: Webui, folder: Path) -> tuple[LoadedModel, dict[str, object]]:
    """Load with the settings of the Model tab, the API or the saved ones.

    Returns:
        The model, and the host's settings that follow from them.

    Raises:
        GPTQLoaderError: see `errors`.
    """
    import gptq_loader_plugin as gptq
    from gptq_loader_extensions.webui.generate import Generating
    from gptq_loader_extensions.webui.templates import template_for

    folder = folder.absolute()  # a folder that is not there is no repository on the hub
    args, plugins = webui.shared.args, gptq.Plugins(_Progress(webui.logger), installed=True)
    settings: dict[str, object] = {}
    named = option(args.gptq_template)
    if named is not None and (template := template_for(folder, plugins, named=named)):
        settings["instruction_template_str"] = template.jinja
    options = LoadOptions(
        device="cpu" if args.cpu else None,
        backend=option(args.gptq_backend),
        template=named,
        context=_context(args.gptq_context),
    )
    loaded = gptq.load(folder, options=options, plugins=plugins)
    Generating(loaded)
    settings["truncation_length"] = loaded.context
    webui.logger.info("KERNELS: %s", loaded.plan.headline())
    for warning in dict.fromkeys((*loaded.warnings, *loaded.plan.warnings)):
        webui.logger.warning("%s", warning)
    return loaded, settings


def wrap_unload(webui: Webui) -> Callable[..., None]:
    """Make the host's `unload_model` give a model of ours its memory back.

    A reply that is being written ends first: its thread reads the weights.
    """
    theirs = webui.models.unload_model

    def unload_model(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the host's
        from gptq_loader_extensions.webui.generate import generating_of
        from gptq_loader_plugin.system.heap import release_freed

        ours = None if webui.shared.model is None else generating_of(webui.shared.model)
        if ours is None:
            theirs(*args, **kwargs)
            return
        webui.shared.stop_everything = True
        ours.stop()
        try:
            theirs(*args, **kwargs)
        finally:
            ours.close()
            release_freed()

    return unload_model


def option(value: object) -> str | None:
    """Read a setting that may be left to us: None for empty and for "auto"."""
    text = str(value or "").strip()
    return None if text.lower() in ("", AUTO, "none") else text


def _context(value: object) -> int | None:
    try:
        return int(str(value or 0)) or None
    except ValueError as error:
        raise OptionInvalid(
            f"the context is {value!r}, which is no number of tokens",
            hint="give a number, or 0 for what the checkpoint says",
        ) from error
