"""Lay out the settings of a reply: the panel beside every tab."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.events import AT_ONCE, PRIVATE
from gptq_loader_extensions.gradio.jobs.reply import thinking_names
from gptq_loader_extensions.gradio.storage.presets import (
    CUSTOM,
    OWN,
    PRESETS,
    SAMPLING,
    own_sampling,
    preset_of,
    preset_values,
)
from gptq_loader_extensions.gradio.tabs.panel_values import NAMES, OPTIONS, PENALTY, THINKING
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.storage.settings_file import ModelSettings
    from gptq_loader_extensions.gradio.tabs.adapter_choice import AdapterChoice
    from gptq_loader_extensions.gradio.tabs.panel_values import PanelValues

__all__ = ["SettingsPanel"]

DEFAULTS = GenerateOptions()


class SettingsPanel:
    """The panel; made inside the page's layout.

    Args:
        models: holds the model.
        adapter: which of its adapters writes the replies, which is chosen in the page's head.

    Numbers have no bounds here: GenerateOptions checks them, and names the one out of range.

    Attributes:
        parts: the components, in the order of a reply's inputs.
        card: the button that copies the model card's system message.
        preset: the list of presets.
        kept: what the browser has kept of the panel, in JSON, or "".
    """

    def __init__(self, models: Models, adapter: AdapterChoice) -> None:
        self._models, self._adapter = models, adapter
        with gr.Accordion("Settings", open=True, elem_id=elements.SETTINGS):
            system = gr.Textbox(
                label="System message",
                placeholder="None",
                info="how the model should behave; it belongs to the conversation",
                lines=2,
                max_lines=6,
                elem_id=elements.SYSTEM,
            )
            self.card = gr.Button(
                "Use the model card's", size="sm", elem_id=elements.CARD_SYSTEM, visible=False
            )
            thinking = gr.Radio(
                list(THINKING),
                value="Automatic",
                label="Thinking",
                info="whether the model thinks before it answers",
                elem_id=elements.THINKING,
                visible=False,
            )
            max_new_tokens = _number(
                "Max new tokens", elements.MAX_NEW_TOKENS, "the longest reply; a word is 1 to 2"
            )
            self.preset = gr.Dropdown(
                [*PRESETS, OWN, CUSTOM],
                value="Balanced",
                label="Sampling",
                info="how freely words are picked",
                elem_id=elements.PRESET,
            )
            temperature = _slider(
                "Temperature", elements.TEMPERATURE, 0, 2, 0.05, "0: always the likeliest word"
            )
        with gr.Accordion("Advanced sampling", open=False, elem_id=elements.SAMPLING):
            top_p = _slider(
                "Top p", elements.TOP_P, 0.01, 1, 0.01, "keeps the likeliest words up to this share"
            )
            top_k = _number("Top k", elements.TOP_K, "keeps so many words; 0 keeps every one")
            min_p = _slider(
                "Min p", elements.MIN_P, 0, 1, 0.01, "drops words rarer than this, by the likeliest"
            )
            repetition = _slider(
                "Repetition penalty", elements.REPETITION_PENALTY, 1, 2, 0.05, "1: none"
            )
            frequency = _penalty("Frequency penalty", elements.FREQUENCY_PENALTY)
            presence = _penalty("Presence penalty", elements.PRESENCE_PENALTY)
            stop = gr.Textbox(
                label="Stop strings",
                info="one a line; a reply ends before any of them",
                lines=1,
                max_lines=4,
                elem_id=elements.STOP_STRINGS,
            )
            seed = _number("Seed", elements.SEED, "empty: another reply each time")
        named = {
            "system": system,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition,
            "seed": seed,
            "frequency": frequency,
            "presence": presence,
            "stop": stop,
            "thinking": thinking,
            "adapter": adapter.part,
        }
        self._named = named
        self.parts: list[Any] = [named[name] for name in NAMES]
        self.kept = gr.Textbox(
            "", elem_id=elements.PANEL_KEPT, elem_classes=elements.CARRIER_CLASS, label="Panel"
        )
        self._wire()

    def _wire(self) -> None:
        system, numbers = self._named["system"], [self._named[name] for name in SAMPLING]
        self.preset.select(
            self._apply_preset, self.preset, numbers, queue=False, show_progress="hidden", **PRIVATE
        )
        self.card.click(self._copy_card, None, system, queue=False, **PRIVATE)
        # The browser keeps the values, and names the preset that they are.
        names, presets = json.dumps(NAMES), json.dumps(preset_values())
        keep = (
            f"(...values) => gptqPage.keepPanel({names}, {presets}, {json.dumps(CUSTOM)}, values)"
        )
        gr.on(
            [part.change for part in self.parts],
            None,
            [*self.parts, self.preset],
            [self.preset],
            js=keep,
            **AT_ONCE,
        )

    def show_settings(
        self, settings: ModelSettings | None, *, fresh: bool = False
    ) -> dict[Any, Any]:
        """Return the updates that show a model's settings.

        Args:
            settings: the settings; None leaves what the user typed.
            fresh: whether nobody has chosen an adapter of this model yet.
        """
        updates = self.show_model(fresh=fresh)
        if settings is not None:
            sampling = settings.sampling
            values = {
                "system": settings.system,
                **{name: getattr(sampling, name) for name in OPTIONS},
                "frequency": settings.frequency,
                "presence": settings.presence,
                "stop": "\n".join(text.replace("\n", "\\n") for text in sampling.stop),
                "thinking": next(
                    name for name, value in THINKING.items() if value is settings.thinking
                ),
            }
            updates |= {**self._values(values), self._adapter.part: updates[self._adapter.part]}
            updates[self.preset] = gr.update(value=preset_of(sampling))
        return updates

    def show_model(self, *, fresh: bool = False) -> dict[Any, Any]:
        """Return the updates that show what the loaded model has settings for."""
        adapter = self._adapter.choose() if fresh else self._adapter.show()
        loaded = self._models.loaded
        has_card = loaded is not None and bool(loaded.model.card.system)
        thinks = loaded is not None and bool(thinking_names(loaded.model.template))
        return {
            self.card: gr.update(visible=has_card),
            self._named["thinking"]: gr.update(visible=thinks),
            self._adapter.part: adapter,
        }

    def restore(self, kept: PanelValues | None) -> dict[Any, Any]:
        """Return the updates that show what the browser has kept; None leaves what is there."""
        return {} if kept is None else self._values(kept.model_dump())

    def restore_system(self, system: str) -> dict[Any, Any]:
        """Return the update that shows a conversation's system message."""
        return {self._named["system"]: system}

    def _values(self, values: dict[str, Any]) -> dict[Any, Any]:
        thinking = values.pop("thinking") or "Automatic"
        adapter = self._adapter.choose(values.pop("adapter", None))
        loaded = self._models.loaded
        thinks = loaded is not None and bool(thinking_names(loaded.model.template))
        return {
            **{self._named[name]: value for name, value in values.items()},
            self._named["thinking"]: gr.update(value=thinking, visible=thinks),
            self._adapter.part: adapter,
        }

    def _apply_preset(self, name: str) -> list[Any]:
        loaded = self._models.loaded
        if name == CUSTOM:
            return [gr.update() for _ in SAMPLING]
        own = loaded is not None and name == OWN
        preset = own_sampling(loaded.model) if loaded and own else PRESETS.get(name, DEFAULTS)
        return [getattr(preset, option) for option in SAMPLING]

    def _copy_card(self) -> str:
        loaded = self._models.loaded
        return (loaded.model.card.system or "") if loaded else ""


def _number(label: str, option: str, info: str | None = None) -> gr.Number:
    value = getattr(DEFAULTS, option)
    return gr.Number(value, label=label, info=info, precision=0, elem_id=option)


def _slider(
    label: str, option: str, minimum: float, maximum: float, step: float, info: str | None = None
) -> gr.Slider:
    value = getattr(DEFAULTS, option)
    return gr.Slider(minimum, maximum, value, step=step, label=label, info=info, elem_id=option)


def _penalty(label: str, elem_id: str) -> gr.Slider:
    info = "0: none; above it, words that were there come less"
    return gr.Slider(-PENALTY, PENALTY, 0, step=0.1, label=label, info=info, elem_id=elem_id)
