"""Lay out the settings of a reply: the panel beside every tab."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.events import PRIVATE
from gptq_loader_extensions.gradio.storage.presets import (
    OWN,
    PRESETS,
    SAMPLING,
    own_sampling,
    preset_of,
)
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.storage.settings_file import ModelSettings

__all__ = ["OPTIONS", "SettingsPanel", "read_options"]

DEFAULTS = GenerateOptions()
# In the order in which the page hands them to a reply, after the system message.
OPTIONS = ("max_new_tokens", *SAMPLING, "seed")


def read_options(values: Sequence[Any]) -> tuple[str, GenerateOptions]:
    """Read the panel's values: the system message, and how to sample.

    Raises:
        OptionInvalid: a value is out of range.
    """
    system, *chosen = values
    return system or "", GenerateOptions.parse(dict(zip(OPTIONS, chosen, strict=True)))


class SettingsPanel:
    """The panel; made inside the page's layout.

    Numbers have no bounds here: GenerateOptions checks them, and names the one out of range.

    Attributes:
        parts: the components, in the order of a reply's inputs.
        card: the button that copies the model card's system message.
        preset: the list of presets.
    """

    def __init__(self, models: Models) -> None:
        with gr.Accordion("Settings", open=True, elem_id=elements.SETTINGS):
            system = gr.Textbox(
                label="System message",
                placeholder="None",
                lines=2,
                max_lines=6,
                elem_id=elements.SYSTEM,
            )
            self.card = gr.Button(
                "Use the model card's", size="sm", elem_id=elements.CARD_SYSTEM, visible=False
            )
            max_new_tokens = _number("Max new tokens", elements.MAX_NEW_TOKENS)
            self.preset = gr.Dropdown(
                [*PRESETS, OWN], value="Balanced", label="Sampling", elem_id=elements.PRESET
            )
            temperature = _slider(
                "Temperature", elements.TEMPERATURE, 0, 2, 0.05, "0: deterministic"
            )
        with gr.Accordion("More numbers", open=False, elem_id=elements.SAMPLING):
            top_p = _slider("Top p", elements.TOP_P, 0.01, 1, 0.01)
            top_k = _number("Top k", elements.TOP_K, "0 keeps every token")
            min_p = _slider("Min p", elements.MIN_P, 0, 1, 0.01)
            penalty = _slider("Repetition penalty", elements.REPETITION_PENALTY, 1, 2, 0.05)
            seed = _number("Seed", elements.SEED, "empty: another reply each time")
        self.parts: list[Any] = [
            system,
            max_new_tokens,
            temperature,
            top_p,
            top_k,
            min_p,
            penalty,
            seed,
        ]

        def apply_preset(name: str) -> list[Any]:
            loaded = models.loaded
            own = loaded is not None and name == OWN
            preset = own_sampling(loaded.model) if loaded and own else PRESETS.get(name, DEFAULTS)
            return [getattr(preset, option) for option in SAMPLING]

        def copy_card() -> str:
            loaded = models.loaded
            return (loaded.model.card.system or "") if loaded else ""

        numbers = [temperature, top_p, top_k, min_p, penalty]
        self.preset.select(
            apply_preset, self.preset, numbers, queue=False, show_progress="hidden", **PRIVATE
        )
        self.card.click(copy_card, None, system, queue=False, **PRIVATE)

    def show_settings(self, models: Models, settings: ModelSettings | None) -> dict[Any, Any]:
        """Return the updates that show settings; None leaves what the user typed."""
        loaded = models.loaded
        has_card = loaded is not None and bool(loaded.model.card.system)
        updates: dict[Any, Any] = {self.card: gr.update(visible=has_card)}
        if settings is not None:
            values = [settings.system, *(getattr(settings.sampling, option) for option in OPTIONS)]
            updates |= dict(zip(self.parts, values, strict=True))
            updates[self.preset] = gr.update(value=preset_of(settings.sampling))
        return updates


def _number(label: str, option: str, info: str | None = None) -> gr.Number:
    value = getattr(DEFAULTS, option)
    return gr.Number(value, label=label, info=info, precision=0, elem_id=option)


def _slider(
    label: str, option: str, minimum: float, maximum: float, step: float, info: str | None = None
) -> gr.Slider:
    value = getattr(DEFAULTS, option)
    return gr.Slider(minimum, maximum, value, step=step, label=label, info=info, elem_id=option)
