"""Lay out the chat page, and wire it to a loaded model."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, fields, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio.about import explanation, head, model_name
from gptq_loader_extensions.gradio.conversation import Message, Moment, answer, take_back
from gptq_loader_extensions.gradio.versions import known, takes_messages, to_pairs
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gptq_loader_plugin.loaded import LoadedModel

__all__ = ["build_page", "launch_style"]

DEFAULTS = GenerateOptions()
# In the order in which the page hands them to a reply.
OPTIONS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
)
# Replies written at once; each has its own cache, and they share the machine. More wait.
REPLIES_AT_ONCE = 4
WELCOME = "### What would you like to know?\nThe model runs on this machine."

# These events are the page's own, not an interface for programs.
PRIVATE: dict[str, Any] = known(gr.Button.click, api_visibility="private") or {"api_name": False}

Conversation = tuple[Message, ...]
Drawing = tuple[Any, ...]

logger = logging.getLogger(__name__)


def build_page(model: LoadedModel) -> gr.Blocks:
    """Build the chat page of one loaded model.

    Every browser tab has a conversation of its own. Since gradio 6 the look belongs to the launch:
    pass `**launch_style()` there.
    """
    style = launch_style()
    at_launch = known(gr.Blocks.launch, **style)
    look = {} if at_launch else style
    with gr.Blocks(title=model_name(model), analytics_enabled=False, **look) as page:
        gr.HTML(head(model), elem_id="about")
        with gr.Accordion("Why this kernel", open=False):
            gr.HTML(explanation(model), elem_id="explain")
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                parts = _chat_parts()
            with gr.Column(scale=1, min_width=280):
                settings = _settings(model)
        _wire(model, parts, settings)
    return page


def launch_style() -> dict[str, Any]:
    """Give the theme and the style sheet, as options of `launch` (or of `Blocks` before 6)."""
    theme = gr.themes.Base(
        primary_hue="teal",
        secondary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    css = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return {"theme": theme, "css": css}


@dataclass(frozen=True, slots=True)
class _ChatParts:
    """What a reply changes, in the order in which `_drawn` gives the changes."""

    conversation: gr.State
    cancel: gr.State
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
    conversation, cancel = gr.State(()), gr.State(None)
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
            max_lines=8,
            autofocus=True,
            scale=1,
            min_width=160,
        )
        send = gr.Button("Send", elem_id="send", variant="primary", scale=0)
        stop = gr.Button("Stop", elem_id="stop", variant="stop", scale=0, visible=False)
    with gr.Row(elem_id="below"):
        status = gr.Markdown("", elem_id="status")
        retry, undo, clear = (
            gr.Button(name, elem_id=name.lower(), size="sm", scale=0, interactive=False)
            for name in ("Retry", "Undo", "Clear")
        )
    return _ChatParts(
        conversation, cancel, chat, message, status, send, stop, retry, undo, clear
    )


def _settings(model: LoadedModel) -> list[Any]:
    """Lay out the settings; give them in the order of a reply's inputs."""
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
            minimum=1,
            elem_id="max_new_tokens",
        )
        temperature = gr.Slider(
            0,
            2,
            DEFAULTS.temperature,
            step=0.05,
            label="Temperature",
            info="0 is deterministic: always the likeliest token",
            elem_id="temperature",
        )
    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
        top_p = gr.Slider(0.01, 1, DEFAULTS.top_p, step=0.01, label="Top p", elem_id="top_p")
        top_k = gr.Number(
            DEFAULTS.top_k,
            label="Top k",
            info="0 keeps every token",
            precision=0,
            minimum=0,
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
            yield _drawn(Moment(conversation))
            return
        asked = (*conversation, {"role": "user", "content": text})
        yield from stream_reply(model, asked, values, before=conversation, draft=text)

    def retry(conversation: Conversation, *values: Any) -> Iterator[Drawing]:  # noqa: ANN401
        kept, question = take_back(conversation)
        asked = (*kept, {"role": "user", "content": question})
        yield from stream_reply(model, asked, values, before=conversation)

    def undo(conversation: Conversation) -> Drawing:
        kept, question = take_back(conversation)
        return _drawn(Moment(kept, draft=question))

    def clear() -> Drawing:
        return _drawn(Moment(()))

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
    gr.on(
        [parts.message.submit, parts.send.click],
        send,
        [parts.message, parts.conversation, *settings],
        **replying,
    )
    parts.retry.click(retry, [parts.conversation, *settings], **replying)
    parts.undo.click(undo, [parts.conversation], outputs, **at_once)
    parts.clear.click(clear, None, outputs, **at_once)
    parts.stop.click(stop, [parts.cancel], None, **at_once)


def stream_reply(
    model: LoadedModel,
    asked: Conversation,
    values: Sequence[Any],
    *,
    before: Conversation,
    draft: str | None = None,
) -> Iterator[Drawing]:
    """Stream a reply as changes of the page; on an error, put things back and say what is wrong.

    Args:
        model: answers.
        asked: the conversation, the question last.
        values: the settings' values, in their order.
        before: the conversation to go back to on an error.
        draft: the text to put back into the message box on an error.

    Raises:
        gr.Error: with what is wrong, and what to do.
    """
    cancel = threading.Event()
    system, *chosen = values
    try:
        options = GenerateOptions.parse(dict(zip(OPTIONS, chosen, strict=True)))
        moments = answer(model, asked, options, system=system or "", cancel=cancel)
        for i, moment in enumerate(moments):
            if moment.warning:
                gr.Warning(escape(moment.warning), **known(gr.Warning, title="Left out"))
            emptied = "" if i == 0 and draft is not None else moment.draft
            yield _drawn(replace(moment, draft=emptied), cancel, steady=moment.running and i > 0)
    except GPTQLoaderError as error:
        yield _drawn(Moment(before, draft=draft))
        raise _told(error.message, error.hint) from error
    except RuntimeError as error:  # torch's own: out of memory, a device that went away
        logger.exception("a reply failed")
        yield _drawn(Moment(before, draft=draft))
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise _told(
            f"the model failed: {first}", "shorten the conversation; see the terminal for more"
        ) from error
    finally:
        cancel.set()


def _drawn(
    moment: Moment, cancel: threading.Event | None = None, *, steady: bool = False
) -> Drawing:
    """Turn a moment into a change of each of the chat's parts, in their order.

    Args:
        moment: what to show.
        cancel: what ends the reply.
        steady: whether the buttons are as they were; what is not changed is not redrawn.
    """
    same = gr.update()
    idle = not moment.running
    buttons = [
        gr.update(visible=idle),
        gr.update(visible=not idle),
        *[gr.update(interactive=idle and bool(moment.messages))] * 3,
    ]
    return (
        moment.messages,
        cancel,
        _for_chatbot(moment.messages),
        same if moment.draft is None else gr.update(value=moment.draft),
        moment.status,
        *([same] * 5 if steady else buttons),
    )


def _for_chatbot(messages: Conversation) -> list[Any]:
    """Give a conversation as the Chatbot takes it; a reply without text is said to be one."""
    shown = [
        {**it, "content": it["content"] or "*(a reply without text)*"} for it in messages
    ]
    return shown if takes_messages(gr.Chatbot) else to_pairs(shown)


def _told(message: str, hint: str) -> gr.Error:
    """Make an error the page shows in words, and that leaves no traceback in the terminal."""
    words = f"{message[:1].upper()}{message[1:]}. {hint[:1].upper()}{hint[1:]}."
    options = known(gr.Error, title="That did not work", print_exception=False)
    return gr.Error(escape(words), **options)
