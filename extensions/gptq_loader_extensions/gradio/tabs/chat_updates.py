"""Draw a reply of the chat: turn its moments into changes of the page's parts, by name."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio.error_messages import as_words
from gptq_loader_extensions.gradio.jobs.conversation import Message, Moment, answer
from gptq_loader_extensions.gradio.tabs.saved_chats import write_kept
from gptq_loader_extensions.gradio.tabs.settings_panel import read_options
from gptq_loader_extensions.gradio.versions import takes_messages, to_pairs
from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gptq_loader_extensions.gradio.jobs.models import Models

__all__ = ["Conversation", "Drawing", "drawn", "from_markdown", "stream_reply"]

Conversation = tuple[Message, ...]
Drawing = dict[str, Any]

# Fenced code, to the end while its end is not yet written, and code within a line.
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
TAG = re.compile(r"<(?=[A-Za-z/!?])")
WRITTEN = re.compile(r"&amp;lt;|&lt;")
UNWRITTEN = {"&amp;lt;": "&lt;", "&lt;": "<"}
# What a person may do between two replies, and not during one.
IDLE_ONLY = ("retry", "undo", "new", "delete", "picker", "prompt")


def stream_reply(
    models: Models,
    asked: Conversation,
    values: Sequence[Any],
    *,
    key: str,
    before: Conversation,
    draft: str | None = None,
) -> Iterator[Drawing]:
    """Stream a reply as changes of the page; on an error, put things back and say what is wrong.

    Args:
        models: answers.
        asked: the conversation, the question last.
        values: the settings' values, in their order.
        key: the conversation's key in the browser.
        before: the conversation to go back to on an error.
        draft: the text to put back into the message box on an error.
    """
    cancel = threading.Event()
    back = Moment(before, draft=draft)
    try:
        system, options = read_options(values)
        moments = answer(models, asked, options, system=system, cancel=cancel)
        for i, moment in enumerate(moments):
            if moment.warning:
                gr.Warning(escape(moment.warning))
            emptied = "" if i == 0 and draft is not None else moment.draft
            steady = moment.running and i > 1  # the second, too, names the buttons: see events.py
            yield drawn(replace(moment, draft=emptied), cancel, key=key, steady=steady)
    except (GPTQLoaderError, MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
        words = as_words(error, hint="shorten the conversation; the terminal says more")
        yield drawn(replace(back, problem=words), key=key)
    finally:
        cancel.set()


def drawn(
    moment: Moment,
    cancel: threading.Event | None = None,
    *,
    key: str = "",
    steady: bool = False,
) -> Drawing:
    """Turn a moment into changes of the chat's parts; those that are not named stay.

    Args:
        moment: what to show.
        cancel: what ends the reply.
        key: the conversation's key in the browser, or "" for one that has none yet.
        steady: whether the buttons are as they were; what is not changed is not redrawn.
    """
    change: Drawing = {
        "conversation": moment.messages,
        "cancel": cancel,
        "problem": moment.problem,
        "chat": _for_chatbot(moment.messages),
        "status": moment.status,
    }
    if moment.draft is not None:
        change["message"] = gr.update(value=moment.draft)
    if steady:
        return change
    idle = not moment.running
    change["key"] = key
    change["kept"] = write_kept(key, moment.messages) if key else ""
    change["send"], change["stop"] = gr.update(visible=idle), gr.update(visible=not idle)
    for name in IDLE_ONLY:
        change[name] = gr.update(interactive=idle)
    for name in ("retry", "undo", "delete"):
        change[name] = gr.update(interactive=idle and bool(moment.messages))
    return change


def _for_chatbot(messages: Conversation) -> list[Any]:
    """Give a conversation as the Chatbot takes it."""
    shown = [{**it, "content": _as_markdown(it["content"])} for it in messages]
    return shown if takes_messages(gr.Chatbot) else to_pairs(shown)


def _as_markdown(text: str) -> str:
    """Keep what looks like a tag, outside code, from being taken for one and vanishing."""
    if not text:
        return "*(a reply without text)*"
    parts = CODE.split(text)  # every second part is code
    parts[::2] = [TAG.sub("&lt;", it.replace("&lt;", "&amp;lt;")) for it in parts[::2]]
    return "".join(parts)


def from_markdown(text: str) -> str:
    """Turn a message that was edited where it is shown back into what the model reads."""
    parts = CODE.split(text)
    parts[::2] = [WRITTEN.sub(lambda it: UNWRITTEN[it[0]], part) for part in parts[::2]]
    return "".join(parts)
