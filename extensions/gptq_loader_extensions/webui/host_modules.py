"""Import text-generation-webui's modules, and check that they have the names we use."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ALIASES", "NAME", "TRANSFORMERS", "Webui", "import_page", "import_webui", "is_ours"]

NAME = "GPTQ (gptq_loader_plugin)"  # in the list of loaders
ALIASES = {NAME.lower(), "gptq", "gptq_loader", "gptq-loader", "gptq_loader_plugin"}
TRANSFORMERS = "Transformers"  # the host's loader whose settings and generation ours shares
MODULES = {
    "modules.shared": (
        "args", "original_args", "args_defaults", "settings", "fix_loader_name", "model",
        "tokenizer", "model_name", "stop_everything", "generation_lock", "user_config",
        "lora_names", "model_dirty_from_training",
    ),
    "modules.loaders": (
        "loaders_and_params", "loaders_samplers", "transformers_samplers", "list_model_elements",
        "list_all_samplers", "get_all_params",
    ),
    "modules.models_settings": ("infer_loader", "get_model_metadata"),
    "modules.models": ("load_model", "unload_model", "transformers_loader"),
    "modules.text_generation": ("generate_reply_HF",),
    "modules.utils": ("resolve_model_path", "get_available_instruction_templates"),
    "modules.logging_colors": ("logger",),
}  # fmt: skip
PAGE = {
    "modules.ui_model_menu": (
        "create_ui", "create_event_handlers", "load_model_wrapper", "save_model_settings",
        "handle_load_model_event_final",
    ),
}  # fmt: skip
TESTED = "commit 1dcde41, of 2026-05-03"


@dataclass(frozen=True, slots=True)
class Webui:
    """text-generation-webui's modules, by their own names."""

    shared: Any
    loaders: Any
    models_settings: Any
    models: Any
    text_generation: Any
    utils: Any
    logger: Any


def is_ours(loader: object) -> bool:
    """Return whether a loader's name, as a user may have typed it, is ours."""
    return isinstance(loader, str) and loader.strip().lower() in ALIASES


def import_webui() -> Webui:
    """Import the modules that it has without its page.

    Raises:
        PluginError: a module or a name that we use is missing.
    """
    modules = _import(MODULES)
    logger = modules.pop("logging_colors").logger
    return Webui(**modules, logger=logger)


def import_page() -> Any:  # noqa: ANN401 - a module of the host's
    """Import the module that makes the Model tab.

    Raises:
        PluginError: the module or a name that we use is missing.
    """
    return _import(PAGE)["ui_model_menu"]


def _import(required: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Import modules that must have these names; return them by their last name."""
    modules: dict[str, Any] = {}
    for module, names in required.items():
        try:
            modules[module.removeprefix("modules.")] = imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("modules"):
                raise  # a package that the host itself needs, and reports
            raise _missing(module) from error
        for name in names:
            if not hasattr(imported, name):
                raise _missing(f"{module}.{name}")
    return modules


def _missing(name: str) -> PluginError:
    return PluginError(
        f"this text-generation-webui has no {name}, which the GPTQ loader needs",
        hint="update gptq-loader-plugin, or use the version of text-generation-webui that it was "
        f"tested with ({TESTED})",
    )
