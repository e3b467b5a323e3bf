"""Lay out the Raw tab: complete a prompt exactly as it was typed."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
import threading
from collections.abc import Iterator  # noqa: TC003
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.events import AT_ONCE, REPLIES, stop
from gptq_loader_extensions.gradio.jobs.reply import raw_prompt, write_reply
from gptq_loader_extensions.gradio.tabs.panel_values import read_settings
from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.tabs.tab import Wiring

__all__ = ["RawTab"]


class RawTab:
    """The tab; made inside the page's layout, then wired.

    Args:
        models: generates the completion.
    """

    def __init__(self, models: Models) -> None:
        self._models = models
        self._cancel = gr.State(None)
        self._prompt = gr.Textbox(
            label="Prompt",
            info="Sent without a template; special tokens in it count as such.",
            placeholder="The capital of France is",
            lines=8,
            max_lines=16,
            elem_id=elements.RAW_PROMPT,
        )
        with gr.Row():
            self._complete = gr.Button("Complete", variant="primary", elem_id=elements.RAW_COMPLETE)
            self._stop = gr.Button(
                "Stop",
                variant="stop",
                elem_id=elements.RAW_STOP,
                elem_classes=elements.STOPS_CLASS,
                visible=False,
            )
            self._append = gr.Button("Append to the prompt", elem_id=elements.RAW_APPEND)
        self._problem = gr.HTML("", elem_id=elements.RAW_PROBLEM)
        self._reply = gr.Textbox(
            label="Completion", lines=8, max_lines=16, interactive=False, elem_id=elements.RAW_REPLY
        )
        self._status = gr.Markdown(
            "", elem_id=elements.RAW_STATUS, elem_classes=elements.STATUS_CLASS
        )

    def wire(self, wiring: Wiring) -> None:
        """Connect what a person does with what the model does."""
        buttons = [self._complete, self._stop]
        outputs = [self._cancel, *buttons, self._problem, self._reply, self._status]
        inputs = [self._prompt, *wiring.panel.parts]
        self._complete.click(self._stream, inputs, outputs, **REPLIES)
        self._stop.click(stop, [self._cancel], None, **AT_ONCE)
        self._append.click(
            lambda prompt, reply: (prompt + reply, "", ""),
            [self._prompt, self._reply],
            [self._prompt, self._reply, self._status],
            **AT_ONCE,
        )

    def _stream(self, text: str, *values: Any) -> Iterator[dict[Any, Any]]:  # noqa: ANN401
        """Complete the prompt."""
        cancel = threading.Event()
        busy = {self._complete: gr.update(visible=False), self._stop: gr.update(visible=True)}
        yield {self._cancel: cancel, self._problem: "", **busy}
        try:
            settings = read_settings(values)
            prepare = raw_prompt(text, settings)
            for state in write_reply(self._models, prepare, settings.options, cancel=cancel):
                yield {self._reply: state.reply, self._status: escape(state.status), **busy}
        except (GPTQLoaderError, MemoryError, RuntimeError) as error:
            yield {self._problem: alert(format_error(error)), self._status: ""}
        finally:
            cancel.set()
        yield {self._complete: gr.update(visible=True), self._stop: gr.update(visible=False)}
