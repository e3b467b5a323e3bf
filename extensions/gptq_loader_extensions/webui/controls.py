"""Add the controls of our loader to the Model tab, in the Gradio 4 that the host brings."""

from __future__ import annotations

import functools
from html import escape
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.webui.host_modules import NAME, is_ours
from gptq_loader_extensions.webui.loading import AUTO, option
from gptq_loader_plugin.checkpoint.detect import detect
from gptq_loader_plugin.errors import GPTQLoaderError, NoBackend
from gptq_loader_plugin.system.atomic_file import write_whole
from gptq_loader_plugin.system.patch import Patch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gptq_loader_extensions.webui.host_modules import Webui
    from gptq_loader_extensions.webui.loading import LoadHandler
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["patch_page"]

OWN_TEMPLATES = ("checkpoint", "card", "chatml")
BACKEND_INFO = (
    "The kernel that multiplies by the packed weights. auto: the fastest that works here."
)
TEMPLATE_INFO = "The chat template. auto: the checkpoint's own, else the model card's, else ChatML."
CONTEXT_INFO = "The context length in tokens. 0: the model's maximum."
STYLE = (
    "white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font-family: monospace; "
    "font-size: 12px; line-height: 1.4"
)
NO_MODEL = "Choose a GPTQ model above to see which kernel will run it, and why."


def patch_page(webui: Webui, page: Any, loader: LoadHandler, plugins: Plugins) -> list[Patch]:  # noqa: ANN401 - a module of the host's
    """Make the patches that give the page's next Model tab the controls."""
    original_create, original_handlers = page.create_ui, page.create_event_handlers

    @functools.wraps(original_create)
    def create_ui() -> None:
        original_create()
        _create(webui, plugins)

    @functools.wraps(original_handlers)
    def create_event_handlers() -> None:
        original_handlers()
        if not webui.shared.args.multi_user:
            _connect(webui, plugins)

    replacements: dict[str, object] = {
        "create_ui": create_ui,
        "create_event_handlers": create_event_handlers,
        "load_model_wrapper": _explain_failure(webui, page.load_model_wrapper, loader),
        "save_model_settings": _save_without_loader(webui, page.save_model_settings),
        "handle_load_model_event_final": _show_context(webui, page.handle_load_model_event_final),
    }
    return [Patch(page, name, replacement) for name, replacement in replacements.items()]


def _create(webui: Webui, plugins: Plugins) -> None:
    """Create the controls, the first of the main options."""
    import gradio as gr

    shared = webui.shared
    args, enabled = shared.args, not shared.args.multi_user
    names = [template.name for template in plugins.templates()]
    others = [name for name in names if name not in OWN_TEMPLATES]
    shown = is_ours(args.loader)
    with gr.Column(min_width=0) as column:  # one below the other, as the host's own are
        shared.gradio["gptq_backend"] = gr.Dropdown(
            label="gptq-backend",
            choices=[AUTO, *(kernel.name for kernel in plugins.kernels())],
            value=args.gptq_backend,
            info=BACKEND_INFO,
            interactive=enabled,
            visible=shown,
            elem_id="gptq-backend",
        )
        shared.gradio["gptq_template"] = gr.Dropdown(
            label="gptq-template",
            choices=[AUTO, *OWN_TEMPLATES, *others],
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
    # the first control below the heading "Main options", where the host has it still
    _move_above(column, shared.gradio.get("gpu_layers") or shared.gradio["loader"])


def _move_above(block: Any, other: Any) -> None:  # noqa: ANN401 - Gradio's
    """Move a block from where it was created to right above another one, or above its form."""
    if other.parent is not None and other.parent.get_block_name() == "form":
        other = other.parent
    old, new = block.parent, other.parent
    if old is None or new is None or other not in new.children:
        return  # leave it at the end of the page
    old.children.remove(block)
    new.children.insert(new.children.index(other), block)
    block.parent = new


def _connect(webui: Webui, plugins: Plugins) -> None:
    """Update the explanation when the host's model status or the kernel changes."""
    gradio = webui.shared.gradio
    explain = functools.partial(_explain, webui, plugins)
    inputs, outputs = [gradio["model_menu"], gradio["gptq_backend"]], gradio["gptq_explain"]
    for control in ("model_status", "gptq_backend"):
        gradio[control].change(explain, inputs, outputs, show_progress=False)


def _explain(webui: Webui, plugins: Plugins, model: str | None, backend: str | None) -> str:
    """Return which kernel would run a model and why; of the loaded one, which runs it."""
    import gptq_loader_plugin as gptq
    from gptq_loader_extensions.webui.generate import find_generate

    shared = webui.shared
    if not model or model == "None":
        return _html(NO_MODEL)
    folder = webui.utils.resolve_model_path(model).absolute()
    generate = None if shared.model is None else find_generate(shared.model)
    if generate is not None and (model, backend) == (shared.model_name, shared.args.gptq_backend):
        return _html(generate.loaded.explain().replace(str(folder), model, 1))
    if not detect(folder).is_gptq:
        return _html(f"{model} is not a GPTQ checkpoint; choose another loader for it.")
    try:
        plan = gptq.explain(
            folder,
            device="cpu" if shared.args.cpu else None,
            backend=option(backend),
            plugins=plugins,
        )
    except GPTQLoaderError as error:
        return _html("\n\n".join(_in_words(error, backend)))
    return _html(plan.explain().replace(str(folder), model, 1))


def _in_words(error: GPTQLoaderError, backend: object) -> tuple[str, str]:
    """Return an error and its hint in the words of this page; the kernel's own reason first."""
    named = option(backend)
    if not isinstance(error, NoBackend) or named is None:
        return error.message, error.hint
    reasons = {declined.kernel: declined.reason for declined in error.declined}
    first = f"{named} cannot run here: {reasons[named]}\n\n" if named in reasons else ""
    return (
        f"{first}{error.message}",
        "set gptq-backend to auto, and the best kernel that can run it is chosen",
    )


def _html(text: str) -> str:
    return f'<pre style="{STYLE}" tabindex="0">{escape(text)}</pre>'


def _explain_failure(
    webui: Webui, original: Callable[..., Iterator[str]], loader: LoadHandler
) -> Callable[..., Iterator[str]]:
    """Wrap the page's load, to answer a failed one with our message instead of a traceback."""

    @functools.wraps(original)
    def load_model_wrapper(*args: Any, **kwargs: Any) -> Iterator[str]:  # noqa: ANN401 - the host's
        loader.error = None
        for status in original(*args, **kwargs):
            if loader.error is None:
                yield status
                continue
            message, hint = _in_words(loader.error, webui.shared.args.gptq_backend)
            yield (
                f"### The model could not be loaded\n\n{_html(message)}\n\n**Hint:** {escape(hint)}"
            )

    return load_model_wrapper


def _save_without_loader(
    webui: Webui, original: Callable[..., Iterator[str]]
) -> Callable[..., Iterator[str]]:
    """Wrap the page's save, to leave out our loader's name where it is inferred anyway.

    The host cannot load a model whose saved loader it does not know: after we are uninstalled, it
    could not load those models with any loader.
    """

    @functools.wraps(original)
    def save_model_settings(model: str, state: dict[str, Any]) -> Iterator[str]:
        statuses = list(original(model, state))
        if is_ours(state.get("loader")) and webui.models_settings.infer_loader(model, {}) == NAME:
            _remove_saved_loader(webui, model)
        yield from statuses

    return save_model_settings


def _remove_saved_loader(webui: Webui, model: str) -> None:
    from pathlib import Path

    import yaml

    shared = webui.shared
    key = Path(model).name + "$"
    if shared.user_config.get(key, {}).pop("loader", None) is not None:
        file = Path(shared.args.model_dir) / "config-user.yaml"
        write_whole(file, yaml.dump(dict(shared.user_config), sort_keys=False))


def _show_context(webui: Webui, original: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """Wrap the end of the page's load, to show the context length of the loaded model."""

    @functools.wraps(original)
    def handle_load_model_event_final(length: Any, loader: Any, state: Any) -> list[Any]:  # noqa: ANN401 - the host's
        updates = original(length, loader, state)
        if loader == NAME and webui.shared.model is not None:
            updates[0] = webui.shared.settings["truncation_length"]
        return updates

    return handle_load_model_event_final
