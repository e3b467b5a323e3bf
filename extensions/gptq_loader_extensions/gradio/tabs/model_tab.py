"""Lay out the Model tab: choose, load, see what runs and why, save settings, unload."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
import threading
from collections.abc import Iterator  # noqa: TC003
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.error_messages import alert, as_words
from gptq_loader_extensions.gradio.events import AT_ONCE, LOADS, stop
from gptq_loader_extensions.gradio.jobs.loading import LoadView, describe_loaded, load_watched
from gptq_loader_extensions.gradio.storage.settings_file import ModelSettings
from gptq_loader_extensions.gradio.tabs.download_box import DownloadBox
from gptq_loader_extensions.gradio.tabs.header import head
from gptq_loader_extensions.gradio.tabs.settings_panel import SettingsPanel, read_options
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.system.memory import resident_memory
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.storage.catalog import Catalog, Entry
    from gptq_loader_extensions.gradio.storage.settings_file import SettingsFile
    from gptq_loader_extensions.gradio.tabs.tab import Wiring

__all__ = ["ModelTab"]

AUTOMATIC = ("Automatic", "")
TEMPLATES = [("The checkpoint's own", "checkpoint"), ("The model card's", "card")]
NO_DOWNLOADS = (
    "<p class='empty'>This server downloads nothing: start it with <code>--allow-downloads</code>, "
    "or run <code>gptq-loader download owner/repo:branch</code> and press Refresh.</p>"
)


class ModelTab:
    """The tab; made inside the page's layout, then wired.

    Args:
        models: holds the model.
        catalog: what may be loaded.
        settings: what is saved for each model.
        header: the page's header.
        downloads: whether models may be downloaded.
    """

    def __init__(
        self,
        models: Models,
        catalog: Catalog,
        settings: SettingsFile,
        header: gr.HTML,
        *,
        downloads: bool,
    ) -> None:
        self._models, self._catalog, self._settings = models, catalog, settings
        self._header = header
        with gr.Row(elem_id=elements.CHOOSE):
            self.model = gr.Dropdown(
                [],
                value=None,
                label="Model",
                info="Choosing one loads it, in place of the one before.",
                elem_id=elements.MODEL,
                scale=1,
            )
            self.refresh = gr.Button("Refresh", elem_id=elements.REFRESH, scale=0, min_width=90)
            self._stop = gr.Button(
                "Cancel",
                elem_id=elements.LOAD_CANCEL,
                elem_classes=elements.STOPS_CLASS,
                variant="stop",
                visible=False,
                scale=0,
                min_width=90,
            )
        self._cancel = gr.State(None)
        self._progress = gr.HTML("", elem_id=elements.LOADING, elem_classes=elements.WORK_CLASS)
        self._download = DownloadBox(catalog) if downloads else None
        if not downloads:
            gr.HTML(NO_DOWNLOADS, elem_id=elements.NO_DOWNLOADS)
        with gr.Accordion("How to load it", open=False, elem_id=elements.HOW):
            with gr.Row():
                self._device = _choice("Device", elements.DEVICE, _devices())
                self._backend = _choice("Kernel", elements.BACKEND, _kernels())
            with gr.Row():
                self._template = _choice("Template", elements.LOAD_TEMPLATE, _templates())
                self._context = gr.Number(
                    None,
                    label="Context",
                    info="tokens; empty: as long as the model allows",
                    precision=0,
                    elem_id=elements.CONTEXT,
                )
        with gr.Row(elem_id=elements.MODEL_BUTTONS):
            self._save, self._reload, self._unload = (
                gr.Button(name, elem_id=elem_id, interactive=False)
                for name, elem_id in (
                    ("Save settings for this model", elements.SAVE),
                    ("Reload the model", elements.RELOAD),
                    ("Unload", elements.UNLOAD),
                )
            )
        self._plan = gr.HTML("", elem_id=elements.PLAN, elem_classes=elements.SHEET_CLASS)
        self._facts = gr.HTML("", elem_id=elements.FACTS, elem_classes=elements.SHEET_CLASS)

    @property
    def _how(self) -> list[Any]:
        return [self._device, self._backend, self._context, self._template]

    def wire(self, wiring: Wiring) -> None:
        """Connect what a person does with what is loaded."""
        panel = wiring.panel

        def choose(name: str) -> Iterator[dict[Any, Any]]:
            try:
                entry = self._catalog.find(name)
            except GPTQLoaderError as error:
                yield {self._progress: alert(as_words(error))}
                return
            saved, note = self._settings.read(name)
            chosen = saved or ModelSettings()
            yield {**self._filled(_options(chosen)), **panel.filled(self._models, chosen)}
            yield from self._load(entry, _options(chosen), panel, note)

        def reload(name: str | None, *how: Any) -> Iterator[dict[Any, Any]]:  # noqa: ANN401
            try:
                entry = self._catalog.find(_named(name))
            except GPTQLoaderError as error:
                yield {self._progress: alert(as_words(error))}
                return
            yield from self._load(entry, _load_options(how), panel, "")

        def save(name: str | None, *values: Any) -> str:  # noqa: ANN401
            how, chosen = values[:4], values[4:]
            try:
                named = _named(name)
                system, sampling = read_options(chosen)
                options = _load_options(how)
                template = options.template
                settings = ModelSettings(
                    device=options.device,
                    backend=options.backend,
                    context=options.context,
                    template=template if isinstance(template, str) else None,
                    system=system,
                    sampling=sampling,
                )
                note = self._settings.save(named, settings)
            except GPTQLoaderError as error:
                return alert(as_words(error))
            return f"<p class='done'>Saved for {escape(named)}.</p>{_noted(note)}"

        def unload() -> dict[Any, Any]:
            before = resident_memory()
            self._models.unload()
            after = resident_memory()
            sizes = (
                f" The process held {write_size(before)}, and holds {write_size(after)} now."
                if before is not None and after is not None
                else ""
            )
            return {
                self._progress: f"<p class='done'>Unloaded.{sizes}</p>",
                self._header: head(None),
                self.model: gr.update(value=None),
                self._plan: "",
                self._facts: "",
                **self._enabled(None, loaded=False),
            }

        outputs = [
            self.model,
            self._progress,
            self._save,
            self._reload,
            self._unload,
            self.refresh,
            self._stop,
            self._cancel,
            self._plan,
            self._facts,
            self._header,
            *self._how,
            *panel.parts,
            panel.card,
            panel.preset,
        ]
        # not `input`, which gradio 6.31 fires twice for one choice
        self.model.select(choose, [self.model], outputs, **LOADS)
        self._reload.click(reload, [self.model, *self._how], outputs, **LOADS)
        self._stop.click(stop, [self._cancel], None, **AT_ONCE)
        self._unload.click(unload, None, outputs, **LOADS)
        self._save.click(save, [self.model, *self._how, *panel.parts], [self._progress], **AT_ONCE)
        self.refresh.click(self.listed, [self.model], [self.model], **AT_ONCE)
        if self._download is not None:
            self._download.wire(self.model, self.listed)
        opening = wiring.page.load(lambda: self._opened(panel), None, outputs, **AT_ONCE)
        opening.then(self._described, None, [self._facts, self._plan], **AT_ONCE)

    def listed(self, chosen: str | None) -> Any:  # noqa: ANN401 - a change of a component
        """Look again which models there are."""
        entries = self._catalog.entries()
        value = chosen if chosen in [it.name for it in entries] else None
        return gr.update(choices=[(it.label, it.name) for it in entries], value=value)

    def _opened(self, panel: SettingsPanel) -> dict[Any, Any]:
        """Show what is loaded, and what is saved for it, to a page that opens."""
        loaded = self._models.loaded
        changes: dict[Any, Any] = {self.model: self.listed(loaded.name if loaded else None)}
        changes[self._header] = head(loaded)
        changes |= self._enabled(loaded.name if loaded else None, loaded=loaded is not None)
        if loaded is None:
            return {**changes, **panel.filled(self._models, None)}
        saved, note = self._settings.read(loaded.name)
        changes |= panel.filled(self._models, saved)
        changes |= self._filled(loaded.options)
        return {**changes, self._progress: _noted(note)} if note else changes

    def _described(self) -> dict[Any, Any]:
        """Show what the loaded model is to a page that opens: its files are looked at again."""
        loaded = self._models.loaded
        if loaded is None:
            return {self._facts: "", self._plan: ""}
        try:
            facts, plan = describe_loaded(loaded)
        except GPTQLoaderError as error:
            return {self._facts: alert(as_words(error))}
        return {self._facts: facts, self._plan: plan}

    def _load(
        self, entry: Entry, options: LoadOptions, panel: SettingsPanel, note: str
    ) -> Iterator[dict[Any, Any]]:
        cancel = threading.Event()
        yield {self._cancel: cancel}
        for view in load_watched(self._models, entry, options, cancel):
            changes = self._shown(view, entry.name, note)
            if not view.running:  # all in one: see events.py
                changes[self._header] = head(self._models.loaded)
                changes |= panel.filled(self._models, None)
            if view.stopped:
                opened = self._opened(panel)
                opened[self.model] |= {"interactive": True}
                changes |= opened | self._described() | {self._progress: view.progress}
            yield changes

    def _shown(self, view: LoadView, name: str, note: str) -> dict[Any, Any]:
        changes: dict[Any, Any] = {self._progress: view.progress + _noted(note)}
        if view.facts is not None:
            changes[self._facts] = view.facts
        if view.plan is not None:
            changes[self._plan] = view.plan
        busy = view.running
        changes |= self._enabled(None if busy else name, loaded=self._models.loaded is not None)
        changes[self.model] = gr.update(interactive=not busy)
        changes[self.refresh] = gr.update(visible=not busy)
        changes[self._stop] = gr.update(visible=busy)
        return changes

    def _enabled(self, chosen: str | None, *, loaded: bool) -> dict[Any, Any]:
        """Let those buttons be pressed that would do something."""
        named = bool(chosen)
        return {
            self._save: gr.update(interactive=named),
            self._reload: gr.update(interactive=named),
            self._unload: gr.update(interactive=named and loaded),
        }

    def _filled(self, options: LoadOptions) -> dict[Any, Any]:
        return dict(zip(self._how, _how_values(options), strict=True))


def _options(settings: ModelSettings) -> LoadOptions:
    return LoadOptions(
        device=settings.device,
        backend=settings.backend,
        context=settings.context,
        template=settings.template,
    )


def _how_values(options: LoadOptions) -> list[Any]:
    return [
        options.device or "",
        options.backend or "",
        options.context,
        options.template or "",
    ]


def _load_options(how: Any) -> LoadOptions:  # noqa: ANN401 - the components' values
    device, backend, context, template = how
    return LoadOptions(
        device=device or None,
        backend=backend or None,
        context=context or None,
        template=template or None,
    )


def _named(name: str | None) -> str:
    if not name:
        raise GPTQLoaderError("no model is chosen", hint="choose one in the list")
    return name


def _noted(note: str) -> str:
    return f"<p role='note'>{escape(note[:1].upper() + note[1:])}.</p>" if note else ""


def _choice(label: str, elem_id: str, choices: list[tuple[str, str]]) -> gr.Dropdown:
    return gr.Dropdown([AUTOMATIC, *choices], value="", label=label, elem_id=elem_id)


def _devices() -> list[tuple[str, str]]:
    from gptq_loader_plugin.device import find_devices

    return [
        (f"{it.torch_name} ({it.name})" if it.name else it.torch_name, it.torch_name)
        for it in find_devices()
    ]


def _kernels() -> list[tuple[str, str]]:
    from gptq_loader_plugin.plugins import Plugins

    return [(it.name, it.name) for it in Plugins(installed=True).kernels()]


def _templates() -> list[tuple[str, str]]:
    from gptq_loader_plugin.plugins import Plugins

    offered = [it.name for it in Plugins(installed=True).templates()]
    return [*TEMPLATES, *((it, it) for it in offered)]
