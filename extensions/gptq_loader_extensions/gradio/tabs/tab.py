"""Define a tab of the page: laid out when it is made, then wired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import gradio as gr

    from gptq_loader_extensions.gradio.tabs.settings_panel import SettingsPanel

__all__ = ["Tab", "Wiring"]


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a tab is wired to, besides its own components.

    Attributes:
        page: its event `load` comes when a browser opens it.
        tab: its event `select` comes when the tab is opened.
        panel: the settings beside every tab.
    """

    page: gr.Blocks
    tab: gr.Tab
    panel: SettingsPanel


class Tab(Protocol):
    """A tab of the page."""

    def wire(self, wiring: Wiring) -> None:
        """Connect what a person does with what happens."""
        ...
