"""Lay out the Compare tab: one prompt, two models side by side."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
import threading
from collections.abc import Iterator  # noqa: TC003
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.events import AT_ONCE, LOADS, REPLIES, stop
from gptq_loader_extensions.gradio.jobs.comparing import by_turns, difference_html
from gptq_loader_extensions.gradio.jobs.conversation import Message, prompt_messages
from gptq_loader_extensions.gradio.jobs.loading import load_with_progress
from gptq_loader_extensions.gradio.jobs.local_models import LocalModels
from gptq_loader_extensions.gradio.jobs.reply import chat_prompt
from gptq_loader_extensions.gradio.tabs.header import model_facts, title
from gptq_loader_extensions.gradio.tabs.measure_box import MeasureBox
from gptq_loader_extensions.gradio.tabs.message_view import LATEX, as_markdown
from gptq_loader_extensions.gradio.tabs.panel_values import read_settings
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.load_options import LoadOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_extensions.gradio.jobs.models import EncodedPrompt, Loaded, Models
    from gptq_loader_extensions.gradio.jobs.reply import ReplySettings
    from gptq_loader_extensions.gradio.storage.catalog import Catalog
    from gptq_loader_extensions.gradio.tabs.tab import Wiring
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.measure.results import MeasuredFiles

__all__ = ["CompareTab"]

COLUMNS = (
    (elements.NAME_ONE, elements.REPLY_ONE, elements.STATUS_ONE),
    (elements.NAME_TWO, elements.REPLY_TWO, elements.STATUS_TWO),
)
HINTS = ("choose one in the Model tab", "choose a second one above")


class CompareTab:
    """The tab; made inside the page's layout, then wired.

    Args:
        models: the page's own model, which is the left one.
        catalog: the models that may be the right one.
        measured: the perplexities that were measured.
    """

    def __init__(self, models: Models, catalog: Catalog, measured: MeasuredFiles) -> None:
        self._sides: tuple[Models, Models] = (models, LocalModels())
        self._catalog = catalog
        self._cancel = gr.State(None)
        with gr.Row(elem_id=elements.CHOOSE_OTHER):
            self._other = gr.Dropdown(
                [],
                value=None,
                label="Second model",
                info="Choosing one loads it beside the model that is loaded.",
                elem_id=elements.OTHER,
                scale=1,
            )
            self._load_stop = gr.Button(
                "Cancel",
                elem_id=elements.OTHER_CANCEL,
                elem_classes=elements.STOPS_CLASS,
                variant="stop",
                visible=False,
                scale=0,
                min_width=90,
            )
            self._unload = gr.Button(
                "Unload", elem_id=elements.COMPARE_UNLOAD, scale=0, min_width=90, visible=False
            )
        self._progress = gr.HTML(
            "", elem_id=elements.OTHER_LOADING, elem_classes=elements.WORK_CLASS
        )
        self._question = gr.Textbox(
            label="Message",
            info="Each model gets it by its own template, with the settings beside. Choose the "
            "sampling Deterministic to compare fairly.",
            lines=2,
            max_lines=6,
            elem_id=elements.COMPARE_MESSAGE,
        )
        with gr.Row():
            self._start = gr.Button(
                "Ask both", variant="primary", elem_id=elements.COMPARE, interactive=False
            )
            self._stop = gr.Button(
                "Stop",
                variant="stop",
                elem_id=elements.COMPARE_STOP,
                elem_classes=elements.STOPS_CLASS,
                visible=False,
            )
        with gr.Row():
            self._columns = [_column(*ids) for ids in COLUMNS]
        self._difference = gr.HTML("", elem_id=elements.COMPARE_WORDS)
        self._measure = MeasureBox(self._sides, measured)

    def wire(self, wiring: Wiring) -> None:
        """Connect what a person does with what the models do."""
        names = [name for name, _, _ in self._columns]
        loading = [self._cancel, self._other, self._progress, self._start, self._load_stop]
        outputs = [*loading, self._unload, *names]
        self._other.select(self._load_second, [self._other], outputs, **LOADS)
        self._unload.click(self._unload_second, None, outputs, **LOADS)
        opened = [wiring.page.load, wiring.tab.select]
        for event in opened:
            event(self._open, None, outputs, **AT_ONCE)
        self._measure.wire(opened)
        replies = [part for column in self._columns for part in column]
        running = [self._cancel, self._unload, self._start, self._stop, self._difference, *replies]
        self._start.click(self._run, [self._question, *wiring.panel.parts], running, **REPLIES)
        for button in (self._stop, self._load_stop):
            button.click(stop, [self._cancel], None, **AT_ONCE)

    def _load_second(self, name: str) -> Iterator[dict[Any, Any]]:
        """Load the second model."""
        try:
            entry = self._catalog.find(name)
        except GPTQLoaderError as error:
            yield {self._progress: alert(format_error(error))}
            return
        cancel = threading.Event()
        yield {self._cancel: cancel}
        for view in load_with_progress(self._sides[1], entry, LoadOptions(), cancel):
            second = self._sides[1].loaded
            ended = gr.update(interactive=True, value=second.name if second else None)
            yield {  # all in one: see events.py
                self._progress: view.progress,
                self._load_stop: gr.update(visible=view.running),
                self._other: gr.update(interactive=False) if view.running else ended,
                **self._headings(),
            }

    def _unload_second(self) -> dict[Any, Any]:
        """Unload the second model."""
        self._sides[1].unload()
        return {self._progress: "", self._other: gr.update(value=None), **self._headings()}

    def _open(self) -> dict[Any, Any]:
        """List the models, and show which stand side by side."""
        second = self._sides[1].loaded
        choices = [(entry.label, entry.name) for entry in self._catalog.entries()]
        value = second.name if second else None
        return {self._other: gr.update(choices=choices, value=value), **self._headings()}

    def _run(self, question: str, *values: Any) -> Iterator[dict[Any, Any]]:  # noqa: ANN401
        """Send the question to both."""
        cancel = threading.Event()
        busy = {self._start: gr.update(visible=False), self._stop: gr.update(visible=True)}
        yield {self._cancel: cancel, self._difference: "", **self._headings(), **busy}
        texts = ["", ""]
        try:
            settings = read_settings(values)
            turns = prompt_messages([Message(role="user", content=question)], settings.system)
            prepare = _each_with_its_own(turns, settings)
            for at, state in by_turns(self._sides, prepare, settings.options, cancel=cancel):
                _, text, status = self._columns[at]
                texts[at] = state.reply
                shown = as_markdown(state.messages[-1], running=True) if state.messages else ""
                yield {text: shown, status: escape(state.status), **busy}
            difference = difference_html(*texts)
        except (GPTQLoaderError, MemoryError, RuntimeError) as error:
            difference = alert(format_error(error))
        finally:
            cancel.set()
        yield {
            self._difference: difference,
            self._start: gr.update(visible=True),
            self._stop: gr.update(visible=False),
        }

    def _headings(self) -> dict[Any, Any]:
        """Show which models stand side by side."""
        headings = {
            name: _heading(side.loaded, hint)
            for (name, _, _), side, hint in zip(self._columns, self._sides, HINTS, strict=True)
        }
        two = self._sides[1].loaded is not None
        both = two and self._sides[0].loaded is not None
        return {
            **headings,
            self._unload: gr.update(visible=two),
            self._start: gr.update(interactive=both),
        }


def _each_with_its_own(
    turns: list[dict[str, str]], settings: ReplySettings
) -> Callable[[LoadedModel], EncodedPrompt]:
    """Make the prompt of each side; one whose model lacks the chosen adapter has its own."""

    def prepare(model: LoadedModel) -> EncodedPrompt:
        has = model.adapters is not None and settings.adapter in ("", *model.adapters.updates)
        own = settings if has else replace(settings, adapter=None)
        return chat_prompt(turns, own)(model)

    return prepare


def _heading(loaded: Loaded | None, hint: str) -> str:
    facts = ", ".join(model_facts(loaded.model)) if loaded else hint
    return f"<h3>{escape(title(loaded))}</h3><p>{escape(facts)}</p>"


def _column(
    name_id: str, reply_id: str, status_id: str
) -> tuple[gr.HTML, gr.Markdown, gr.Markdown]:
    with gr.Column(min_width=190):
        name = gr.HTML(_heading(None, ""), elem_id=name_id, elem_classes=elements.NAMED_CLASS)
        text = gr.Markdown(
            "", elem_id=reply_id, elem_classes=elements.REPLY_CLASS, latex_delimiters=LATEX
        )
        status = gr.Markdown("", elem_id=status_id, elem_classes=elements.STATUS_CLASS)
    return name, text, status
