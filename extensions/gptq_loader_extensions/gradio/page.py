"""Lay out the page, give it its look, and put it into an application."""

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
from gptq_loader_extensions.gradio.tabs.chat_tab import ChatTab
from gptq_loader_extensions.gradio.tabs.compare_tab import CompareTab
from gptq_loader_extensions.gradio.tabs.header import title
from gptq_loader_extensions.gradio.tabs.model_tab import ModelTab
from gptq_loader_extensions.gradio.tabs.raw_tab import RawTab
from gptq_loader_extensions.gradio.tabs.settings_panel import SettingsPanel
from gptq_loader_extensions.gradio.versions import known
from gptq_loader_plugin.measure.results import MeasuredFiles
from gptq_loader_plugin.system.folders import config_folder, data_folder

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Models

__all__ = ["Parts", "build_page", "launch_style"]

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
    """What a page stands on.

    Attributes:
        models: holds the model and answers.
        catalog: what may be loaded.
        settings: what is saved for each model.
        downloads: whether models may be downloaded.
        measured: the perplexities that are kept.
    """

    models: Models
    catalog: Catalog = field(default_factory=Catalog)
    settings: SettingsFile = field(default_factory=lambda: SettingsFile(config_folder()))
    downloads: bool = True
    measured: MeasuredFiles = field(default_factory=lambda: MeasuredFiles(data_folder()))


def build_page(parts: Parts) -> gr.Blocks:
    """Build the page; it opens at the chat where a model is loaded, and else where one is chosen.

    Every browser tab has a conversation of its own. Since gradio 6 the look belongs to the launch:
    pass `**launch_style()` there.
    """
    models, loaded = parts.models, parts.models.loaded
    style = launch_style()
    at_launch = known(gr.Blocks.launch, **style)
    look = {name: value for name, value in style.items() if name not in at_launch}
    page: gr.Blocks
    with gr.Blocks(title=title(loaded), analytics_enabled=False, **look) as page:
        about = gr.HTML("", elem_id=elements.ABOUT)  # filled for each page that opens
        with gr.Row():
            with (
                gr.Column(scale=3, min_width=300),
                gr.Tabs(selected=_first_tab(models)) as tabs,
            ):
                with _tab("Chat", elements.CHAT_TAB):
                    chat = ChatTab(models, about)
                with _tab("Raw", elements.RAW_TAB):
                    raw = RawTab(models)
                with _tab("Compare", elements.COMPARE_TAB) as compare_tab:
                    compare = CompareTab(models, parts.catalog, parts.measured)
                with _tab("Model", elements.MODEL_TAB):
                    model = ModelTab(
                        models,
                        parts.catalog,
                        parts.settings,
                        about,
                        downloads=parts.downloads,
                    )
            with gr.Column(scale=1, min_width=280):
                panel = SettingsPanel(models)
        model.wire(page, panel)
        chat.wire(page, panel)
        raw.wire(panel)
        compare.wire(page, compare_tab, panel)
        page.load(lambda: gr.update(selected=_first_tab(models)), None, tabs, **AT_ONCE)
    return page


def launch_style() -> dict[str, Any]:
    """Give the look and the script, as options of `launch` (or of `Blocks` before 6)."""
    theme = Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(**CONTRAST)
    folder = Path(__file__).parent
    css = (folder / "style.css").read_text(encoding="utf-8")
    script = (folder / "page.js").read_text(encoding="utf-8")
    return {"theme": theme, "css": css, "head": f"<script>{script}</script>"}


def _first_tab(models: Models) -> str:
    """Open at the chat where there is somebody to talk to, and else where to choose."""
    return elements.CHAT_TAB if models.loaded else elements.MODEL_TAB


def _tab(name: str, identity: str) -> gr.Tab:
    return gr.Tab(name, id=identity, elem_id=identity, **known(gr.Tab, render_children=True))
