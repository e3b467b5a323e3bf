"""Lay out the chat page, and wire it to a loaded model."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
import threading  # noqa: TC003
from collections.abc import Iterator  # noqa: TC003
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.themes import Base

from gptq_loader_extensions.gradio.about import head, model_name
from gptq_loader_extensions.gradio.conversation import Moment, take_back
from gptq_loader_extensions.gradio.drawing import Conversation, Drawing, drawn, stream_reply
from gptq_loader_extensions.gradio.versions import known
from gptq_loader_plugin.options import GenerateOptions

if TYPE_CHECKING:
    from gptq_loader_plugin.loaded import LoadedModel

__all__ = ["build_page", "launch_style"]

DEFAULTS = GenerateOptions()
# Base's own grey and teal are 2.6 and 2.5 to 1 on white; these are 4.8 and 5.5.
CONTRAST = {
    "body_text_color_subdued": "*neutral_500",
    "body_text_color_subdued_dark": "*neutral_400",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_600",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover_dark": "*primary_600",
}
# Replies written at once; each has its own cache, and they share the machine. More wait.
REPLIES_AT_ONCE = 4
WELCOME = "### What would you like to know?\nThe model runs on this machine."

# These events are the page's own, not an interface for programs.
PRIVATE: dict[str, Any] = known(gr.Button.click, api_visibility="private") or {"api_name": False}


def build_page(model: LoadedModel) -> gr.Blocks:
    """Build the chat page of one loaded model.

    Every browser tab has a conversation of its own. Since gradio 6 the look belongs to the launch:
    pass `**launch_style()` there.
    """
    style = launch_style()
    at_launch = known(gr.Blocks.launch, **style)
    look = {} if at_launch else style
    page: gr.Blocks
    with gr.Blocks(title=model_name(model), analytics_enabled=False, **look) as page:
        gr.HTML(head(model), elem_id="about")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                parts = _chat_parts()
            with gr.Column(scale=1, min_width=280):
                settings = _settings(model)
        _wire(model, parts, settings)
    return page


def launch_style() -> dict[str, Any]:
    """Give the theme and the style sheet, as options of `launch` (or of `Blocks` before 6)."""
    theme = Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(**CONTRAST)
    css = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return {"theme": theme, "css": css}


@dataclass(frozen=True, slots=True)
class _ChatParts:
    """What a reply changes, in the order in which `drawn` gives the changes."""

    conversation: gr.State
    cancel: gr.State
    problem: gr.State
    chat: gr.Chatbot
    message: gr.Textbox
    status: gr.Markdown
    send: gr.Button
    stop: gr.Button
    retry: gr.Button
    undo: gr.Button
    clear: gr.Button

    def all(self) -> list[Any]:
        """List them, as outputs of an event."""
        return [getattr(self, it.name) for it in fields(self)]


def _chat_parts() -> _ChatParts:
    conversation, cancel, problem = gr.State(()), gr.State(None), gr.State("")
    options = known(
        gr.Chatbot,
        type="messages",
        buttons=["copy"],
        show_copy_button=True,
        show_label=False,
        layout="bubble",
        allow_tags=False,
        feedback_options=None,
    )
    chat = gr.Chatbot(elem_id="chat", label="Chat", placeholder=WELCOME, **options)
    with gr.Row(elem_id="ask"):
        message = gr.Textbox(
            elem_id="message",
            label="Message",
            show_label=False,
            container=False,
            placeholder="Write a message",
            lines=1,
            max_lines=6,
            autofocus=True,
            scale=1,
            min_width=160,
        )
        send = gr.Button("Send", elem_id="send", variant="primary", scale=0)
        stop = gr.Button("Stop", elem_id="stop", variant="stop", scale=0, visible=False)
    with gr.Row(elem_id="below"):
        status = gr.Markdown("", elem_id="status")
        retry, undo, clear = (
            gr.Button(
                name, elem_id=name.lower(), size="sm", scale=0, min_width=64, interactive=False
            )
            for name in ("Retry", "Undo", "Clear")
        )
    return _ChatParts(
        conversation, cancel, problem, chat, message, status, send, stop, retry, undo, clear
    )


def _settings(model: LoadedModel) -> list[Any]:
    """Lay out the settings; give them in the order of a reply's inputs.

    Numbers have no bounds here: GenerateOptions has them, and says which option is out of them.
    """
    with gr.Accordion("Settings", open=True, elem_id="settings"):
        system = gr.Textbox(
            label="System message", placeholder="None", lines=2, max_lines=6, elem_id="system"
        )
        if recommended := model.card.system:
            take = gr.Button("Take the model card's", size="sm", elem_id="card-system")
            take.click(lambda: recommended, None, system, queue=False, **PRIVATE)
        most = gr.Number(
            DEFAULTS.max_new_tokens,
            label="Max new tokens",
            precision=0,
            elem_id="max_new_tokens",
        )
        temperature = gr.Slider(
            0,
            2,
            DEFAULTS.temperature,
            step=0.05,
            label="Temperature",
            info="0: deterministic",
            elem_id="temperature",
        )
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        top_p = gr.Slider(0.01, 1, DEFAULTS.top_p, step=0.01, label="Top p", elem_id="top_p")
        top_k = gr.Number(
            DEFAULTS.top_k,
            label="Top k",
            info="0 keeps every token",
            precision=0,
            elem_id="top_k",
        )
        min_p = gr.Slider(0, 1, DEFAULTS.min_p, step=0.01, label="Min p", elem_id="min_p")
        penalty = gr.Slider(
            1,
            2,
            DEFAULTS.repetition_penalty,
            step=0.05,
            label="Repetition penalty",
            elem_id="repetition_penalty",
        )
        seed = gr.Number(
            DEFAULTS.seed,
            label="Seed",
            info="empty: another reply each time",
            precision=0,
            elem_id="seed",
        )
    return [system, most, temperature, top_p, top_k, min_p, penalty, seed]


def _wire(model: LoadedModel, parts: _ChatParts, settings: list[Any]) -> None:
    """Connect what the user does with what the model does."""

    def send(text: str, conversation: Conversation, *values: Any) -> Iterator[Drawing]:  # noqa: ANN401
        if not text.strip():
            yield drawn(Moment(conversation))
            return
        asked = (*conversation, {"role": "user", "content": text})
        yield from stream_reply(model, asked, values, before=conversation, draft=text)

    def retry(conversation: Conversation, *values: Any) -> Iterator[Drawing]:  # noqa: ANN401
        kept, question = take_back(conversation)
        asked = (*kept, {"role": "user", "content": question})
        yield from stream_reply(model, asked, values, before=conversation)

    def undo(conversation: Conversation) -> Drawing:
        kept, question = take_back(conversation)
        return drawn(Moment(kept, draft=question))

    def clear() -> Drawing:
        return drawn(Moment(()))

    def stop(cancel: threading.Event | None) -> None:
        if cancel is not None:
            cancel.set()

    outputs = parts.all()
    replying: dict[str, Any] = {
        "outputs": outputs,
        "show_progress": "hidden",
        "concurrency_limit": REPLIES_AT_ONCE,
        "concurrency_id": "replies",
        **PRIVATE,
    }
    at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
    sent = gr.on(
        [parts.message.submit, parts.send.click],
        send,
        [parts.message, parts.conversation, *settings],
        **replying,
    )
    again = parts.retry.click(retry, [parts.conversation, *settings], **replying)
    for reply in (sent, again):
        reply.then(_tell, [parts.problem], None, concurrency_limit=None, **PRIVATE)
    parts.undo.click(undo, [parts.conversation], outputs, **at_once)
    parts.clear.click(clear, None, outputs, **at_once)
    parts.stop.click(stop, [parts.cancel], None, **at_once)


def _tell(problem: str) -> None:
    """Show an error; in an event of its own, for one that fails has its outputs covered."""
    if problem:
        raise gr.Error(escape(problem), **known(gr.Error, duration=None, print_exception=False))
