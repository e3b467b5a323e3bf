"""Add our loader to a running text-generation-webui, once, without changing any file of it."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import logging
import sys
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.webui.host_modules import (
    NAME,
    TRANSFORMERS,
    import_page,
    import_webui,
    is_ours,
)
from gptq_loader_extensions.webui.loading import LoadHandler, option, wrap_unload
from gptq_loader_plugin.checkpoint.detect import detect
from gptq_loader_plugin.errors import GPTQLoaderError, PluginError
from gptq_loader_plugin.system.patch import Patch, apply_all, patch_imports

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gptq_loader_extensions.webui.host_modules import Webui
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["add_loader", "register"]

# The settings, which the host's "Save settings" saves, and their defaults.
SETTINGS = {"gptq_backend": "auto", "gptq_template": "auto", "gptq_context": 0}
CONTROLS = ["cpu", *SETTINGS, "gptq_explain"]  # of the Model tab, shown with our loader
APPLIED = "gptq_loader_patches"  # in modules.shared: every change to the host, in order
CHATML = "ChatML"  # the host's own template of that name
CUSTOM = "Custom (obtained from model metadata)"  # the host's name of a checkpoint's own


def add_loader() -> None:
    """Register from the host's extension; log an error and let the host go on without us."""
    try:
        register()
    except PluginError as error:
        logging.getLogger("textgen").error("%s\nhint: %s", error, error.hint)  # noqa: TRY400 - the message is enough


def register() -> list[Patch]:
    """Add the loader to the text-generation-webui in this process; a second call changes nothing.

    Returns:
        Every change to it, in order; `undo_all` leaves it as it was.

    Raises:
        PluginError: it lacks a name that we use; nothing of it was changed.
    """
    webui = import_webui()
    shared = webui.shared
    patches: list[Patch] = getattr(shared, APPLIED, [])
    if shared.args.portable or patches:
        return patches
    page = None if shared.args.nowebui else import_page()
    if shared.args.api or shared.args.public_api:
        importlib.import_module("modules.api.script")  # now, so that it is among what is changed
    from gptq_loader_plugin.plugins import Plugins

    plugins = Plugins(installed=True)
    loader = LoadHandler(
        webui, before_load=lambda: _apply_late(webui, patches, lambda: loader.loading)
    )
    patches += [
        Patch(shared, APPLIED, patches),
        *_patch_lists(webui),
        *_patch_settings(webui),
        *_patch_recognition(webui, plugins),
        *loader.patches(),
        *patch_imports(webui.models.unload_model, wrap_unload(webui)),
        *_patch_api(webui, patches, lambda: loader.loading),
        *_patch_generation(webui),
        *_patch_command_line(webui),
    ]
    if page is not None:
        from gptq_loader_extensions.webui.controls import patch_page

        patches += patch_page(webui, page, loader, plugins)
    apply_all(patches)
    _warn_of_model_loaded_before(webui)
    return patches


def _patch_lists(webui: Webui) -> list[Patch]:
    """List the loader, and drop what the host has cached of all loaders."""
    loaders = webui.loaders
    return [
        Patch(loaders.loaders_and_params, NAME, CONTROLS),
        Patch(loaders.loaders_samplers, NAME, loaders.transformers_samplers()),
        *(
            patch
            for cached in (loaders.list_all_samplers, loaders.get_all_params)
            for patch in patch_imports(cached, functools.cache(inspect.unwrap(cached)))
        ),
    ]


def _patch_settings(webui: Webui) -> list[Patch]:
    shared, original = webui.shared, webui.loaders.list_model_elements

    @functools.cache  # as the host's is
    def list_model_elements() -> list[str]:
        return [*original(), *SETTINGS]

    return [
        *(
            Patch(arguments, name, value)
            for arguments in (shared.args, shared.original_args, shared.args_defaults)
            for name, value in SETTINGS.items()
        ),
        *patch_imports(original, list_model_elements),
    ]


def _patch_recognition(webui: Webui, plugins: Plugins) -> list[Patch]:
    settings = webui.models_settings
    original_infer, original_metadata = settings.infer_loader, settings.get_model_metadata

    @functools.wraps(original_infer)
    def infer_loader(
        model_name: str, model_settings: dict[str, Any], hf_quant_method: str | None = None
    ) -> str | None:
        name: str | None = original_infer(model_name, model_settings, hf_quant_method)
        folder = webui.utils.resolve_model_path(model_name)
        if name != TRANSFORMERS or not detect(folder).is_gptq:
            return name
        # The host overrides this template where the checkpoint or the user brings one.
        model_settings.update(_template_settings(webui, folder, plugins))
        return NAME

    @functools.wraps(original_metadata)
    def get_model_metadata(model: str) -> Any:  # noqa: ANN401 - the host's
        metadata = original_metadata(model)
        if not is_ours(metadata.get("loader")):
            return metadata
        folder = webui.utils.resolve_model_path(model)
        named = option(metadata.get("gptq_template"))
        if named is not None:
            metadata.update(_template_settings(webui, folder, plugins, named=named))
        context = metadata.get("gptq_context")
        if isinstance(context, int) and context > 0:
            metadata["truncation_length"] = metadata["truncation_length_info"] = context
        return metadata

    return [
        Patch(settings, "infer_loader", infer_loader),
        *patch_imports(original_metadata, get_model_metadata),
    ]


def _template_settings(
    webui: Webui, folder: Path, plugins: Plugins, *, named: str | None = None
) -> dict[str, str]:
    """Return the host's settings for a checkpoint's template; none where it has none."""
    from gptq_loader_extensions.webui.templates import template_for

    try:
        template = template_for(folder, plugins, named=named)
    except GPTQLoaderError as error:  # the load fails on it too
        webui.logger.warning("%s: %s (hint: %s)", folder.name, error, error.hint)
        return {}
    if template is None:
        return {}
    if template.chatml and CHATML in webui.utils.get_available_instruction_templates():
        return {"instruction_template": CHATML} | (
            {} if named is None else {"instruction_template_str": template.jinja}
        )
    return {"instruction_template": CUSTOM, "instruction_template_str": template.jinja}


def _patch_api(webui: Webui, patches: list[Patch], loading: Callable[[], bool]) -> list[Patch]:
    from gptq_loader_extensions.webui.api_patches import patch_api

    return patch_api(webui, [patch.owner for patch in patches], loading)


def _apply_late(webui: Webui, patches: list[Patch], loading: Callable[[], bool]) -> None:
    """Patch the API where it was imported after the loader was added."""
    late = _patch_api(webui, patches, loading)
    apply_all(late)
    patches += late


def _patch_generation(webui: Webui) -> list[Patch]:
    """Let a request that was cancelled end its reply at the next token."""
    original = webui.text_generation.generate_reply_HF

    @functools.wraps(original)
    def generate_reply_HF(  # noqa: N802 - the host's name
        question: Any,  # noqa: ANN401 - the host's
        original_question: Any,  # noqa: ANN401 - the host's
        state: dict[str, Any],
        *args: Any,  # noqa: ANN401 - the host's
        **kwargs: Any,  # noqa: ANN401 - the host's
    ) -> Any:  # noqa: ANN401 - the host's
        from gptq_loader_extensions.webui.generate import find_generate

        generate = find_generate(webui.shared.model)
        if generate is not None:
            shared = webui.shared
            generate.cancel, generate.chat = state.get("stop_event"), bool(kwargs.get("is_chat"))
            generate.reuse = not (shared.lora_names or shared.model_dirty_from_training)
        return original(question, original_question, state, *args, **kwargs)

    return [Patch(webui.text_generation, "generate_reply_HF", generate_reply_HF)]


def _patch_command_line(webui: Webui) -> list[Patch]:
    """Read `--loader gptq` again: the host has read it before it had such a loader."""
    shared, original = webui.shared, webui.shared.fix_loader_name
    fix = Patch(shared, "fix_loader_name", lambda name: NAME if is_ours(name) else original(name))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--loader")
    if is_ours(parser.parse_known_args(sys.argv[1:])[0].loader):
        return [fix, Patch(shared.args, "loader", NAME)]
    return [fix]


def _warn_of_model_loaded_before(webui: Webui) -> None:
    """Warn where the host has loaded a GPTQ checkpoint by itself: with random weights, perhaps."""
    name = webui.shared.model_name
    if webui.shared.model is None or webui.shared.args.loader != TRANSFORMERS:
        return
    if detect(webui.utils.resolve_model_path(name)).is_gptq:
        webui.logger.warning(
            "%s was loaded at start-up, before the GPTQ loader was added, and its weights may be "
            "random. Load it again in the Model tab, or start with: gptq-loader webui run",
            name,
        )
