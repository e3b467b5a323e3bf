"""Import text-generation-webui's modules, and check that what we change in them is there."""

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
TRIED = "commit 1dcde41, of 2026-05-03"


@dataclass(frozen=True, slots=True)
class Webui:
    """text-generation-webui's modules, each as it calls them itself."""

    shared: Any
    loaders: Any
    models_settings: Any
    models: Any
    text_generation: Any
    utils: Any
    logger: Any


def is_ours(loader: object) -> bool:
    """Say whether a loader's name, as a user may have typed it, is ours."""
    return isinstance(loader, str) and loader.strip().lower() in ALIASES


def import_webui() -> Webui:
    """Import the modules without a page.

    Raises:
        PluginError: this is no text-generation-webui, or not one that we know.
    """
    found = _import(MODULES)
    logger = found.pop("logging_colors").logger
    return Webui(**found, logger=logger)


def import_page() -> Any:  # noqa: ANN401 - a module of the host's
    """Import the module that makes the Model tab.

    Raises:
        PluginError: it is not as we know it.
    """
    return _import(PAGE)["ui_model_menu"]


def _import(wanted: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module, names in wanted.items():
        try:
            found[module.removeprefix("modules.")] = imported = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("modules"):
                raise  # a package that the host itself needs: it says so
            raise _changed(module) from error
        for name in names:
            if not hasattr(imported, name):
                raise _changed(f"{module}.{name}")
    return found


def _changed(what: str) -> PluginError:
    return PluginError(
        f"this text-generation-webui has no {what}, which the GPTQ loader builds on",
        hint="update gptq-loader-plugin, or use a text-generation-webui of about the version it "
        f"was tried with ({TRIED})",
    )
