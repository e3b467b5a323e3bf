"""Lay out the Model tab: choose, load, see what runs and why, save settings, unload."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.events import AT_ONCE, LOADS, stop
from gptq_loader_extensions.gradio.tabs.check_box import CheckBox
from gptq_loader_extensions.gradio.tabs.download_box import DownloadBox
from gptq_loader_extensions.gradio.tabs.model_events import HOW, ModelEvents

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.storage.catalog import Catalog
    from gptq_loader_extensions.gradio.storage.settings_file import SettingsFile
    from gptq_loader_extensions.gradio.tabs.tab import Wiring

__all__ = ["ModelTab"]

AUTOMATIC = ("Automatic", "")
TEMPLATES = [("The checkpoint's own", "checkpoint"), ("The model card's", "card")]
NO_DOWNLOADS = (
    "<p class='empty'>Downloads are off: start the server with <code>--allow-downloads</code>, "
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
        self._parts: dict[str, Any] = {"header": header, "cancel": gr.State(None)}
        self._lay_out_choice()
        self._download = DownloadBox(catalog) if downloads else None
        if not downloads:
            gr.HTML(NO_DOWNLOADS, elem_id=elements.NO_DOWNLOADS)
        self._lay_out_options()
        self._check = CheckBox(catalog)
        for name, elem_id in (("plan", elements.PLAN), ("facts", elements.FACTS)):
            self._parts[name] = gr.HTML("", elem_id=elem_id, elem_classes=elements.SHEET_CLASS)

    def _lay_out_choice(self) -> None:
        parts = self._parts
        with gr.Row(elem_id=elements.CHOOSE):
            parts["model"] = gr.Dropdown(
                [],
                value=None,
                label="Model",
                info="Choosing one loads it, in place of the one before. Type to search.",
                elem_id=elements.MODEL,
                scale=1,
            )
            parts["refresh"] = gr.Button("Refresh", elem_id=elements.REFRESH, scale=0, min_width=90)
            parts["stop"] = gr.Button(
                "Cancel",
                elem_id=elements.LOAD_CANCEL,
                elem_classes=elements.STOPS_CLASS,
                variant="stop",
                visible=False,
                scale=0,
                min_width=90,
            )
        parts["progress"] = gr.HTML("", elem_id=elements.LOADING, elem_classes=elements.WORK_CLASS)

    def _lay_out_options(self) -> None:
        parts = self._parts
        with gr.Accordion("How to load it", open=False, elem_id=elements.HOW):
            with gr.Row():
                parts["device"] = _choice("Device", elements.DEVICE, _devices())
                parts["backend"] = _choice("Kernel", elements.BACKEND, _kernels())
            with gr.Row():
                parts["template"] = _choice("Template", elements.LOAD_TEMPLATE, _templates())
                parts["context"] = gr.Number(
                    None,
                    label="Context",
                    info="tokens; empty: as long as the model allows",
                    precision=0,
                    elem_id=elements.CONTEXT,
                )
        with gr.Row(elem_id=elements.MODEL_BUTTONS):
            for name, label, elem_id in (
                ("save", "Save settings for this model", elements.SAVE),
                ("reload", "Reload the model", elements.RELOAD),
                ("unload", "Unload", elements.UNLOAD),
            ):
                parts[name] = gr.Button(label, elem_id=elem_id, interactive=False)

    def wire(self, wiring: Wiring) -> None:
        """Connect what a person does with what is loaded."""
        parts, panel = self._parts, wiring.panel
        events = ModelEvents(self._models, self._catalog, self._settings, parts, panel)
        model, how = parts["model"], [parts[option] for option in HOW]
        outputs = [*parts.values(), *panel.parts, panel.card, panel.preset]
        # not `input`, which gradio 6.31 fires twice for one choice
        model.select(events.choose, [model, panel.parts[0]], outputs, **LOADS)
        parts["reload"].click(events.reload, [model, *how], outputs, **LOADS)
        parts["stop"].click(stop, [parts["cancel"]], None, **AT_ONCE)
        parts["unload"].click(events.unload, None, outputs, **LOADS)
        saved = [model, *how, *panel.parts]
        parts["save"].click(events.save, saved, [parts["progress"]], **AT_ONCE)
        parts["refresh"].click(events.refresh, [model], [model, parts["progress"]], **AT_ONCE)
        self._check.wire(model)
        if self._download is not None:
            self._download.wire(wiring.page, model, events.list_models)
        kept = "() => gptqPage.panel()"
        opening = wiring.page.load(events.open, [panel.kept], outputs, js=kept, **AT_ONCE)
        opening.then(events.describe, None, [parts["facts"], parts["plan"]], **AT_ONCE)


def _choice(label: str, elem_id: str, choices: list[tuple[str, str]]) -> gr.Dropdown:
    return gr.Dropdown([AUTOMATIC, *choices], value="", label=label, elem_id=elem_id)


def _devices() -> list[tuple[str, str]]:
    from gptq_loader_plugin.device import find_devices

    return [
        (
            f"{device.torch_name} ({device.name})" if device.name else device.torch_name,
            device.torch_name,
        )
        for device in find_devices()
    ]


def _kernels() -> list[tuple[str, str]]:
    from gptq_loader_plugin.plugins import Plugins

    return [(kernel.name, kernel.name) for kernel in Plugins(installed=True).kernels()]


def _templates() -> list[tuple[str, str]]:
    from gptq_loader_plugin.plugins import Plugins

    offered = [template.name for template in Plugins(installed=True).templates()]
    return [*TEMPLATES, *((name, name) for name in offered)]
