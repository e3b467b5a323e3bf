"""Load a checkpoint with the host's settings, and release its memory when the host unloads it."""

from __future__ import annotations

import logging
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

__all__ = ["LoadHandler", "option", "wrap_unload"]

AUTO = "auto"
LOG_INTERVAL = 5.0  # seconds
FLAGS_LOGGER, HOST_FLAG = "transformers.generation.configuration_utils", "['min_p']"


class LoadHandler:
    """The host's `load_model`, which hands GPTQ checkpoints to us.

    The host's own function still runs: it sees its loader Transformers, which we replace for the
    duration of a load, so that its settings, samplers and log stay its own.

    Args:
        webui: the host's modules.
        before_load: called before each of our loads.

    Attributes:
        error: why the last load of ours failed, or None.
    """

    def __init__(self, webui: Webui, *, before_load: Callable[[], None]) -> None:
        self.error: GPTQLoaderError | None = None
        self._webui = webui
        self._before_load = before_load
        self._original = webui.models.load_model
        self._original_transformers = webui.models.transformers_loader
        self._ours = threading.local()
        self._loads = 0

    def patches(self) -> list[Patch]:
        """Make the patches that have the host load through this."""
        logger, flags = self._webui.logger, logging.getLogger(FLAGS_LOGGER)
        return [
            Patch(self._webui.models, "transformers_loader", self._transformers),
            Patch(logger, "filters", [*logger.filters, self._log_our_name]),
            Patch(flags, "filters", [*flags.filters, self._log_flag]),
            *patch_imports(self._original, self.load_model),
        ]

    def load_model(self, model_name: str, loader: str | None = None) -> Any:  # noqa: ANN401 - a model and a tokenizer
        """Load with our loader where that is selected, with the host's own otherwise."""
        shared = self._webui.shared
        selected = loader if loader is not None else shared.args.loader
        if selected is None:
            selected = self._webui.models_settings.get_model_metadata(model_name)["loader"]
        if not is_ours(selected):
            return self._original(model_name, loader)
        self._before_load()
        self.error = None
        self._ours.loading = True
        self._loads += 1
        try:
            loaded = self._original(model_name, TRANSFORMERS)
        except GPTQLoaderError as error:
            self.error = error.with_traceback(None)  # whose frames hold what was loaded so far
            shared.model_name = "None"  # which is what is loaded now
            self._webui.logger.error("Cannot load %s: %s\nhint: %s", model_name, error, error.hint)  # noqa: TRY400 - the message is enough
            if shared.generation_lock is None:  # at start-up: the program starts without a model
                return None, None
            error.add_note(f"hint: {error.hint}")
            raise error from None
        finally:
            self._ours.loading = False
            self._loads -= 1
            shared.args.loader = NAME
        shared.settings.update(self._ours.settings)  # over those the host takes from metadata
        return loaded

    def _transformers(self, model_name: str) -> Any:  # noqa: ANN401 - a model and a tokenizer
        if not getattr(self._ours, "loading", False):
            return self._original_transformers(model_name)
        loaded, self._ours.settings = load(
            self._webui, self._webui.utils.resolve_model_path(model_name)
        )
        return loaded.model, loaded.tokenizer

    @property
    def loading(self) -> bool:
        """Whether a load of ours is under way, on any thread."""
        return self._loads > 0

    def _log_flag(self, record: Any) -> bool:  # noqa: ANN401 - a log record
        """Leave out a warning of min_p, which the host puts into every generation config."""
        ours = getattr(self._ours, "loading", False)
        return not (ours and HOST_FLAG in record.getMessage())

    def _log_our_name(self, record: Any) -> bool:  # noqa: ANN401 - a log record
        """Name our loader in the line where the host logs that Transformers loads."""
        if record.msg == f'LOADER: "{TRANSFORMERS}"' and getattr(self._ours, "loading", False):
            record.msg = f'LOADER: "{NAME}"'
        return True


class _ProgressLog:
    """Log the progress of a long load every few seconds.

    Args:
        logger: the host's.
    """

    def __init__(self, logger: Any) -> None:  # noqa: ANN401 - the host's
        self._logger = logger
        self._last_logged = time.monotonic()

    @hookimpl
    def gptq_progress(self, progress: Progress) -> None:
        """Log it, unless the last one was logged just now."""
        if progress.total and time.monotonic() - self._last_logged > LOG_INTERVAL:
            self._last_logged = time.monotonic()
            self._logger.info("%s: %d %%", progress.stage, 100 * progress.done // progress.total)


def load(webui: Webui, folder: Path) -> tuple[LoadedModel, dict[str, object]]:
    """Load with the settings of the Model tab, the API or the saved ones.

    Returns:
        The model, and the settings of the host that depend on it.

    Raises:
        GPTQLoaderError: see `errors`.
    """
    import gptq_loader_plugin as gptq
    from gptq_loader_extensions.webui.generate import HostGenerate
    from gptq_loader_extensions.webui.templates import template_for

    folder = folder.absolute()  # a folder that is missing is not looked up on the hub
    args, plugins = webui.shared.args, gptq.Plugins(_ProgressLog(webui.logger), installed=True)
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
    HostGenerate(loaded)
    settings["truncation_length"] = loaded.context
    webui.logger.info("KERNELS: %s", loaded.plan.headline())
    for warning in dict.fromkeys((*loaded.warnings, *loaded.plan.warnings)):
        webui.logger.warning("%s", warning)
    return loaded, settings


def wrap_unload(webui: Webui) -> Callable[..., None]:
    """Wrap the host's `unload_model`, to release the memory of a model of ours.

    A reply in progress ends first: its thread reads the weights.
    """
    original = webui.models.unload_model

    def unload_model(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the host's
        from gptq_loader_extensions.webui.generate import find_generate
        from gptq_loader_plugin.system.heap import release_freed

        generate = None if webui.shared.model is None else find_generate(webui.shared.model)
        if generate is None:
            original(*args, **kwargs)
            return
        webui.shared.stop_everything = True
        generate.stop()
        try:
            original(*args, **kwargs)
        finally:
            generate.close()
            release_freed()

    return unload_model


def option(value: object) -> str | None:
    """Read a setting; None for empty and for "auto", which leave it to us."""
    text = str(value or "").strip()
    return None if text.lower() in ("", AUTO, "none") else text


def _context(value: object) -> int | None:
    try:
        return int(str(value or 0)) or None
    except ValueError as error:
        raise OptionInvalid(
            f"the context must be a number of tokens, not {value!r}",
            hint="use a number, or 0 for the checkpoint's own",
        ) from error
