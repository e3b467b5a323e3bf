"""Lay out the page, and style it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.themes import Base

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.events import AT_ONCE
from gptq_loader_extensions.gradio.storage.catalog import Catalog
from gptq_loader_extensions.gradio.storage.settings_file import SettingsFile
from gptq_loader_extensions.gradio.tabs.adapter_choice import AdapterChoice
from gptq_loader_extensions.gradio.tabs.chat_tab import ChatTab
from gptq_loader_extensions.gradio.tabs.compare_tab import CompareTab
from gptq_loader_extensions.gradio.tabs.header import title
from gptq_loader_extensions.gradio.tabs.model_tab import ModelTab
from gptq_loader_extensions.gradio.tabs.raw_tab import RawTab
from gptq_loader_extensions.gradio.tabs.settings_panel import SettingsPanel
from gptq_loader_extensions.gradio.tabs.tab import Wiring
from gptq_loader_extensions.gradio.versions import known
from gptq_loader_plugin.measure.results import MeasuredFiles
from gptq_loader_plugin.system.folders import config_folder, data_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.tabs.tab import Tab

__all__ = ["Parts", "build_page", "launch_style"]

SCRIPTS = ("page.js", "chats.js", "messages.js")  # each stands on those before it
# Base's own grey and teal are 2.6 and 2.5 to 1 on white; these are 4.8 and 5.5.
CONTRAST = {
    "body_text_color_subdued": "*neutral_500",
    "body_text_color_subdued_dark": "*neutral_400",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_600",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_600",
}


@dataclass(frozen=True, slots=True)
class Parts:
    """What a page is built on.

    Attributes:
        models: holds the model and answers.
        catalog: what may be loaded.
        settings: what is saved for each model.
        downloads: whether models may be downloaded.
        measured: the measured perplexities.
    """

    models: Models
    catalog: Catalog = field(default_factory=Catalog)
    settings: SettingsFile = field(default_factory=lambda: SettingsFile(config_folder()))
    downloads: bool = True
    measured: MeasuredFiles = field(default_factory=lambda: MeasuredFiles(data_folder()))


@dataclass(frozen=True, slots=True)
class TabOfPage:
    """A tab in the list of tabs.

    Attributes:
        title: what a person reads.
        elem_id: its name in elements.py.
        make: makes it of the page's parts and its header.
    """

    title: str
    elem_id: str
    make: Callable[[Parts, gr.HTML], Tab]


# From left to right.
TABS = (
    TabOfPage("Chat", elements.CHAT_TAB, lambda parts, header: ChatTab(parts.models, header)),
    TabOfPage("Raw", elements.RAW_TAB, lambda parts, _: RawTab(parts.models)),
    TabOfPage(
        "Compare",
        elements.COMPARE_TAB,
        lambda parts, _: CompareTab(parts.models, parts.catalog, parts.measured),
    ),
    TabOfPage(
        "Model",
        elements.MODEL_TAB,
        lambda parts, header: ModelTab(
            parts.models, parts.catalog, parts.settings, header, downloads=parts.downloads
        ),
    ),
)


def build_page(parts: Parts) -> gr.Blocks:
    """Build the page; it opens at the chat where a model is loaded, or else where one is chosen.

    Every browser tab has a conversation of its own. Since gradio 6 the style belongs to the launch:
    pass `**launch_style()` there.
    """
    models, loaded = parts.models, parts.models.loaded
    style = launch_style()
    at_launch = known(gr.Blocks.launch, **style)
    options = {name: value for name, value in style.items() if name not in at_launch}
    page: gr.Blocks
    with gr.Blocks(title=title(loaded), analytics_enabled=False, **options) as page:
        with gr.Row(elem_id=elements.HEAD):
            header = gr.HTML("", elem_id=elements.ABOUT)  # filled for each page that opens
            adapter = AdapterChoice(models)
        with gr.Row(elem_id=elements.FRAME):
            with (
                gr.Column(scale=3, min_width=300),
                gr.Tabs(selected=_first_tab(models)) as tabs,
            ):
                made = [_lay_out(tab, parts, header) for tab in TABS]
            with gr.Column(scale=1, min_width=280):
                panel = SettingsPanel(models, adapter)
        for container, tab in made:
            tab.wire(Wiring(page, container, panel))
        page.load(lambda: gr.update(selected=_first_tab(models)), None, tabs, **AT_ONCE)
    return page


def launch_style() -> dict[str, Any]:
    """Return the style and the script, as options of `launch` (or of `Blocks` before 6)."""
    theme = Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(**CONTRAST)
    folder = Path(__file__).parent
    css = (folder / "style.css").read_text(encoding="utf-8")
    scripts = [(folder / name).read_text(encoding="utf-8") for name in SCRIPTS]
    head = "".join(f"<script>{script}</script>" for script in scripts)
    return {"theme": theme, "css": css, "head": head}


def _first_tab(models: Models) -> str:
    """Return the chat where a model is loaded, or the tab where one is chosen."""
    return elements.CHAT_TAB if models.loaded else elements.MODEL_TAB


def _lay_out(tab: TabOfPage, parts: Parts, header: gr.HTML) -> tuple[gr.Tab, Tab]:
    """Make a tab inside the page's layout; return what holds it, and it."""
    options = known(gr.Tab, render_children=True)
    with gr.Tab(tab.title, id=tab.elem_id, elem_id=tab.elem_id, **options) as container:
        return container, tab.make(parts, header)
