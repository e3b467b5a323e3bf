"""The Model tab's controls for our loader, in the Gradio 4 that the host brings."""

from __future__ import annotations

import functools
from html import escape
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.webui.host_modules import NAME, is_ours
from gptq_loader_extensions.webui.loading import AUTO, option
from gptq_loader_plugin.checkpoint.detect import detect
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.system.atomic_file import write_whole
from gptq_loader_plugin.system.patch import Patch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gptq_loader_extensions.webui.host_modules import Webui
    from gptq_loader_extensions.webui.loading import Loads
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["patch_page"]

OWN_TEMPLATES = ("checkpoint", "card", "chatml")
BACKEND_INFO = (
    "Which kernel multiplies by the packed weights. auto: the fastest that is right here."
)
TEMPLATE_INFO = (
    "How messages become a prompt. auto: the checkpoint's own, else the card's, else ChatML."
)
CONTEXT_INFO = "The longest conversation, in tokens. 0: as long as the model can."
STYLE = "overflow-x: auto; margin: 0; font-size: 12px; line-height: 1.4"
NO_MODEL = "Choose a GPTQ model above: this box says which kernel runs it, and why."


def patch_page(webui: Webui, page: Any, loads: Loads, plugins: Plugins) -> list[Patch]:  # noqa: ANN401 - a module of the host's
    """Make the patches that give the page's next Model tab the controls."""
    create_theirs, handle_theirs = page.create_ui, page.create_event_handlers

    @functools.wraps(create_theirs)
    def create_ui() -> None:
        create_theirs()
        _create(webui, plugins)

    @functools.wraps(handle_theirs)
    def create_event_handlers() -> None:
        handle_theirs()
        if not webui.shared.args.multi_user:
            _connect(webui, plugins)

    replacements: dict[str, object] = {
        "create_ui": create_ui,
        "create_event_handlers": create_event_handlers,
        "load_model_wrapper": _say_why(page.load_model_wrapper, loads),
        "save_model_settings": _save(webui, page.save_model_settings),
        "handle_load_model_event_final": _show_context(webui, page.handle_load_model_event_final),
    }
    return [Patch(page, name, replacement) for name, replacement in replacements.items()]


def _create(webui: Webui, plugins: Plugins) -> None:
    """Create the controls, right below the list of loaders."""
    import gradio as gr

    shared = webui.shared
    args, enabled = shared.args, not shared.args.multi_user
    templates = [it.name for it in plugins.templates() if it.name not in OWN_TEMPLATES]
    shown = is_ours(args.loader)
    with gr.Column() as column:
        with gr.Row():
            shared.gradio["gptq_backend"] = gr.Dropdown(
                label="gptq-backend",
                choices=[AUTO, *(it.name for it in plugins.kernels())],
                value=args.gptq_backend,
                info=BACKEND_INFO,
                interactive=enabled,
                visible=shown,
                elem_id="gptq-backend",
            )
            shared.gradio["gptq_template"] = gr.Dropdown(
                label="gptq-template",
                choices=[AUTO, *OWN_TEMPLATES, *templates],
                value=args.gptq_template,
                allow_custom_value=True,
                info=TEMPLATE_INFO,
                interactive=enabled,
                visible=shown,
                elem_id="gptq-template",
            )
            shared.gradio["gptq_context"] = gr.Number(
                label="gptq-context",
                value=args.gptq_context,
                precision=0,
                minimum=0,
                info=CONTEXT_INFO,
                interactive=enabled,
                visible=shown,
                elem_id="gptq-context",
            )
        shared.gradio["gptq_explain"] = gr.HTML(
            value=lambda: _explain(webui, plugins, shared.model_name, args.gptq_backend),
            visible=shown,
            elem_id="gptq-explain",
        )
    _move_below(column, shared.gradio["loader"])


def _move_below(block: Any, other: Any) -> None:  # noqa: ANN401 - Gradio's
    """Move a block from where it was created to right below another one, or below its form."""
    if other.parent is not None and other.parent.get_block_name() == "form":
        other = other.parent
    old, new = block.parent, other.parent
    if old is None or new is None or other not in new.children:
        return  # it stays where it is, at the end of the page
    old.children.remove(block)
    new.children.insert(new.children.index(other) + 1, block)
    block.parent = new


def _connect(webui: Webui, plugins: Plugins) -> None:
    """Explain anew whenever the host says something of a model, and when a kernel is chosen."""
    gradio = webui.shared.gradio
    explain = functools.partial(_explain, webui, plugins)
    inputs, outputs = [gradio["model_menu"], gradio["gptq_backend"]], gradio["gptq_explain"]
    for control in ("model_status", "gptq_backend"):
        gradio[control].change(explain, inputs, outputs, show_progress=False)


def _explain(webui: Webui, plugins: Plugins, model: str | None, backend: str | None) -> str:
    """Say which kernel runs a model and why, from its headers; or how the loaded one runs."""
    import gptq_loader_plugin as gptq
    from gptq_loader_extensions.webui.generate import generating_of

    shared = webui.shared
    if not model or model == "None":
        return _shown(NO_MODEL)
    folder = webui.utils.resolve_model_path(model).absolute()
    ours = None if shared.model is None else generating_of(shared.model)
    if ours is not None and (model, backend) == (shared.model_name, shared.args.gptq_backend):
        return _shown(ours.loaded.explain().replace(str(folder), model, 1))
    if not detect(folder).is_gptq:
        return _shown(f"{model} is no GPTQ checkpoint; choose another loader for it.")
    try:
        plan = gptq.explain(
            folder,
            device="cpu" if shared.args.cpu else None,
            backend=option(backend),
            plugins=plugins,
        )
    except GPTQLoaderError as error:
        return _shown(f"{error.message}\n\n{error.hint}")
    return _shown(plan.explain().replace(str(folder), model, 1))


def _shown(text: str) -> str:
    return f'<pre style="{STYLE}" tabindex="0">{escape(text)}</pre>'


def _say_why(theirs: Callable[..., Iterator[str]], loads: Loads) -> Callable[..., Iterator[str]]:
    """Answer a failed load with our words instead of a traceback."""

    @functools.wraps(theirs)
    def load_model_wrapper(*args: Any, **kwargs: Any) -> Iterator[str]:  # noqa: ANN401 - the host's
        loads.failed = None
        for said in theirs(*args, **kwargs):
            if loads.failed is None:
                yield said
                continue
            words = escape(loads.failed.message).replace("\n", "<br>")
            yield f"### It could not be loaded\n\n{words}\n\n**To do:** {escape(loads.failed.hint)}"

    return load_model_wrapper


def _save(webui: Webui, theirs: Callable[..., Iterator[str]]) -> Callable[..., Iterator[str]]:
    """Save a model's settings without our loader's name, where it is found without it.

    The host cannot load a model whose saved loader it does not know: without us, it could load
    none of those models by any loader.
    """

    @functools.wraps(theirs)
    def save_model_settings(model: str, state: dict[str, Any]) -> Iterator[str]:
        saved = list(theirs(model, state))
        if is_ours(state.get("loader")) and webui.models_settings.infer_loader(model, {}) == NAME:
            _forget_loader(webui, model)
        yield from saved

    return save_model_settings


def _forget_loader(webui: Webui, model: str) -> None:
    from pathlib import Path

    import yaml

    shared = webui.shared
    key = Path(model).name + "$"
    if shared.user_config.get(key, {}).pop("loader", None) is not None:
        file = Path(shared.args.model_dir) / "config-user.yaml"
        write_whole(file, yaml.dump(dict(shared.user_config), sort_keys=False))


def _show_context(webui: Webui, theirs: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Set the page's context length to the one a model was loaded with."""

    @functools.wraps(theirs)
    def handle_load_model_event_final(length: Any, loader: Any, state: Any) -> list[Any]:  # noqa: ANN401 - the host's
        found = theirs(length, loader, state)
        if loader == NAME and webui.shared.model is not None:
            found[0] = webui.shared.settings["truncation_length"]
        return found

    return handle_load_model_event_final
