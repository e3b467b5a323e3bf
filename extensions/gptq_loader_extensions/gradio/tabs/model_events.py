"""Update the Model tab when a person loads, unloads or saves something."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
import threading
from collections.abc import Iterator  # noqa: TC003
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.jobs.loading import LoadView, describe_loaded, load_with_progress
from gptq_loader_extensions.gradio.storage.settings_file import ModelSettings
from gptq_loader_extensions.gradio.tabs.header import header_html
from gptq_loader_extensions.gradio.tabs.panel_values import read_settings
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.system.memory import resident_memory
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.storage.catalog import Catalog, CatalogEntry
    from gptq_loader_extensions.gradio.storage.settings_file import SettingsFile
    from gptq_loader_extensions.gradio.tabs.settings_panel import SettingsPanel

__all__ = ["HOW", "ModelEvents"]

# How to load a model, in the order in which the components are handed over.
HOW = ("device", "backend", "context", "template")

ComponentUpdates = dict[Any, Any]  # the components that change, each with its new value


class ModelEvents:
    """What happens in the tab.

    Args:
        models: holds the model.
        catalog: what may be loaded.
        settings: what is saved for each model.
        parts: the tab's components by name; `header` is the page's.
        panel: the settings beside every tab.
    """

    def __init__(
        self,
        models: Models,
        catalog: Catalog,
        settings: SettingsFile,
        parts: Mapping[str, Any],
        panel: SettingsPanel,
    ) -> None:
        self._models, self._catalog, self._settings = models, catalog, settings
        self._parts, self._panel = parts, panel

    def choose(self, name: str, system: str | None = "") -> Iterator[ComponentUpdates]:
        """Load a model, with what is saved for it.

        Args:
            name: the model's name.
            system: the system message of the conversation that is open.
        """
        try:
            entry = self._catalog.find(name)
        except GPTQLoaderError as error:
            yield {self._parts["progress"]: alert(format_error(error))}
            return
        saved, note = self._settings.read(name)
        how = saved or ModelSettings()
        options = LoadOptions(**{option: getattr(how, option) for option in HOW})
        yield from self._load(entry, options, note, self._panel_settings(saved, system or ""))

    def _panel_settings(self, saved: ModelSettings | None, system: str) -> ModelSettings | None:
        """Return what the panel shows once a model is loaded; None leaves it.

        The system message goes with the conversation, unless it is one that is saved for a model.
        """
        loaded = self._models.loaded
        before = self._settings.read(loaded.name)[0] if loaded is not None else None
        if saved is None and before is None:
            return None
        settings = saved or ModelSettings()
        own = before is not None and before.system == system
        if settings.system or own:
            return settings
        return settings.model_copy(update={"system": system})

    def reload(self, name: str | None, *how: Any) -> Iterator[ComponentUpdates]:  # noqa: ANN401
        """Load the model again, with the options that are chosen now."""
        try:
            entry = self._catalog.find(_chosen(name))
        except GPTQLoaderError as error:
            yield {self._parts["progress"]: alert(format_error(error))}
            return
        yield from self._load(entry, _load_options(how), "", None)

    def save(self, name: str | None, *values: Any) -> str:  # noqa: ANN401
        """Save how to load the model, and how to sample."""
        how, panel = values[: len(HOW)], values[len(HOW) :]
        try:
            name = _chosen(name)
            read = read_settings(panel)
            options = _load_options(how)
            chosen = {option: getattr(options, option) for option in HOW}
            settings = ModelSettings(
                **chosen,
                system=read.system,
                sampling=read.options,
                presence=read.presence,
                frequency=read.frequency,
                thinking=read.thinking,
            )
            note = self._settings.save(name, settings)
        except GPTQLoaderError as error:
            return alert(format_error(error))
        return f"<p class='done'>Saved for {escape(name)}.</p>{_note_html(note)}"

    def unload(self) -> ComponentUpdates:
        """Unload the model, and say what memory that freed."""
        before = resident_memory()
        self._models.unload()
        after = resident_memory()
        sizes = (
            f" The process held {write_size(before)}, and holds {write_size(after)} now."
            if before is not None and after is not None
            else ""
        )
        return {
            self._parts["progress"]: f"<p class='done'>Unloaded.{sizes}</p>",
            self._parts["header"]: header_html(None),
            self._parts["model"]: gr.update(value=None),
            self._parts["plan"]: "",
            self._parts["facts"]: "",
            **self._enable(None, loaded=False),
            **self._panel.show_model(fresh=True),
        }

    def list_models(self, chosen: str | None) -> Any:  # noqa: ANN401 - an update of a component
        """List the models anew."""
        entries = self._catalog.entries()
        value = chosen if chosen in [entry.name for entry in entries] else None
        return gr.update(choices=[(entry.label, entry.name) for entry in entries], value=value)

    def refresh(self, chosen: str | None) -> ComponentUpdates:
        """List the models anew, and say which folders are none."""
        others = self._catalog.others()
        note = ""
        if others:
            what = "1 folder holds" if len(others) == 1 else f"{len(others)} folders hold"
            note = f"{what} no GPTQ checkpoint: {', '.join(others)}"
        return {
            self._parts["model"]: self.list_models(chosen),
            self._parts["progress"]: _note_html(note),
        }

    def open(self, kept: str | None = "") -> ComponentUpdates:
        """Show what is loaded, and what is saved for it, to a page that opens.

        Args:
            kept: what the browser has kept of the panel, which goes before what is saved.
        """
        loaded = self._models.loaded
        name = loaded.name if loaded else None
        updates = {
            self._parts["model"]: self.list_models(name),
            self._parts["header"]: header_html(loaded),
            **self._enable(name, loaded=loaded is not None),
        }
        if loaded is None:
            return {**updates, **self._panel.show_settings(None, fresh=not kept)}
        saved, note = self._settings.read(loaded.name)
        updates |= self._panel.show_settings(None if kept else saved, fresh=not kept)
        updates |= self._show_options(loaded.options)
        return {**updates, self._parts["progress"]: _note_html(note)} if note else updates

    def describe(self) -> ComponentUpdates:
        """Show what the loaded model is to a page that opens; its files are read again."""
        facts, plan = self._parts["facts"], self._parts["plan"]
        loaded = self._models.loaded
        if loaded is None:
            return {facts: "", plan: ""}
        try:
            facts_html, plan_html = describe_loaded(loaded)
        except GPTQLoaderError as error:
            return {facts: alert(format_error(error))}
        return {facts: facts_html, plan: plan_html}

    def _load(
        self,
        entry: CatalogEntry,
        options: LoadOptions,
        note: str,
        settings: ModelSettings | None,
    ) -> Iterator[ComponentUpdates]:
        """Load a model, and show its settings; where that fails, what is loaded stays in sight."""
        cancel = threading.Event()
        header = header_html(self._models.loaded, loading=entry.name)
        yield {
            self._parts["cancel"]: cancel,
            self._parts["header"]: header,
            **self._show_options(options),
        }
        for view in load_with_progress(self._models, entry, options, cancel):
            updates = self._show_load(view, entry.name, note)
            if not view.running:  # all in one: see events.py
                updates[self._parts["header"]] = header_html(self._models.loaded)
                if view.loaded:
                    updates |= self._panel.show_settings(settings, fresh=True)
                else:
                    updates |= self._show_loaded() | {self._parts["progress"]: view.progress}
            yield updates

    def _show_loaded(self) -> ComponentUpdates:
        """Show what is loaded after a load that came to nothing; the panel is as it was."""
        loaded = self._models.loaded
        name = loaded.name if loaded else None
        chosen = self.list_models(name)
        chosen["interactive"] = True
        updates = {
            self._parts["model"]: chosen,
            self._parts["header"]: header_html(loaded),
            **self._enable(name, loaded=loaded is not None),
            **self._panel.show_settings(None),
            **self.describe(),
        }
        return updates | self._show_options(loaded.options) if loaded else updates

    def _show_load(self, view: LoadView, name: str, note: str) -> ComponentUpdates:
        parts, busy = self._parts, view.running
        updates: ComponentUpdates = {parts["progress"]: view.progress + _note_html(note)}
        if view.facts is not None:
            updates[parts["facts"]] = view.facts
        if view.plan is not None:
            updates[parts["plan"]] = view.plan
        updates |= self._enable(None if busy else name, loaded=self._models.loaded is not None)
        updates[parts["model"]] = gr.update(interactive=not busy)
        updates[parts["refresh"]] = gr.update(visible=not busy)
        updates[parts["stop"]] = gr.update(visible=busy)
        return updates

    def _enable(self, chosen: str | None, *, loaded: bool) -> ComponentUpdates:
        """Enable those buttons that would do something."""
        named = bool(chosen)
        return {
            self._parts["save"]: gr.update(interactive=named),
            self._parts["reload"]: gr.update(interactive=named),
            self._parts["unload"]: gr.update(interactive=named and loaded),
        }

    def _show_options(self, options: LoadOptions) -> ComponentUpdates:
        values = {option: getattr(options, option) for option in HOW}
        return {
            self._parts[option]: value if option == "context" else value or ""
            for option, value in values.items()
        }


def _load_options(how: Any) -> LoadOptions:  # noqa: ANN401 - the components' values
    device, backend, context, template = how  # as HOW names them
    return LoadOptions(
        device=device or None,
        backend=backend or None,
        context=context or None,
        template=template or None,
    )


def _chosen(name: str | None) -> str:
    if not name:
        raise GPTQLoaderError("no model is chosen", hint="choose one in the list")
    return name


def _note_html(note: str) -> str:
    return f"<p role='note'>{escape(note[:1].upper() + note[1:])}.</p>" if note else ""
