"""Show the chat: turn its states into updates of the page's components, by their names."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio.error_messages import format_error
from gptq_loader_extensions.gradio.jobs.conversation import ChatState
from gptq_loader_extensions.gradio.jobs.reply import chat_prompt, write_reply
from gptq_loader_extensions.gradio.tabs.saved_chats import write_saved
from gptq_loader_extensions.gradio.tabs.settings_panel import read_options
from gptq_loader_extensions.gradio.versions import takes_messages, to_pairs
from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gptq_loader_extensions.gradio.jobs.conversation import Conversation
    from gptq_loader_extensions.gradio.jobs.models import Models

__all__ = ["Updates", "from_markdown", "render", "stream_updates"]

Updates = dict[str, Any]

# Fenced code, to the end while its end is not yet written, and code within a line.
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
TAG = re.compile(r"<(?=[A-Za-z/!?])")
WRITTEN = re.compile(r"&amp;lt;|&lt;")
UNWRITTEN = {"&amp;lt;": "&lt;", "&lt;": "<"}
# What a person may do between two replies, and not during one.
IDLE_ONLY = ("retry", "undo", "new", "delete", "picker", "prompt")


def stream_updates(
    models: Models,
    messages: Conversation,
    values: Sequence[Any],
    *,
    key: str,
    before: Conversation,
    draft: str | None = None,
) -> Iterator[Updates]:
    """Stream a reply as updates of the page; on an error, restore it and say what is wrong.

    Args:
        models: generates the reply.
        messages: the conversation, the question last.
        values: the settings' values, in their order.
        key: the conversation's key in the browser.
        before: the conversation to go back to on an error.
        draft: the text to put back into the message box on an error.
    """
    cancel = threading.Event()
    try:
        system, options = read_options(values)
        prepare = chat_prompt(messages, system)
        states = write_reply(models, prepare, options, messages=messages, cancel=cancel)
        for i, state in enumerate(states):
            if state.warning:
                gr.Warning(escape(state.warning))
            unchanged = state.running and i > 1  # the second, too, names the buttons: see events.py
            sent = i == 0 and draft is not None  # and leaves the message box
            shown = replace(state, draft="") if sent else state
            yield render(shown, cancel, key=key, buttons_unchanged=unchanged)
    except (GPTQLoaderError, MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
        problem = format_error(error, hint="shorten the conversation; the terminal says more")
        yield render(ChatState(before, draft=draft, problem=problem), key=key)
    finally:
        cancel.set()


def render(
    state: ChatState,
    cancel: threading.Event | None = None,
    *,
    key: str = "",
    buttons_unchanged: bool = False,
) -> Updates:
    """Turn a state into updates of the chat's components; those that are not named stay.

    Args:
        state: what to show.
        cancel: what ends the reply.
        key: the conversation's key in the browser, or "" for one that has none yet.
        buttons_unchanged: whether the buttons are as they were; they are not redrawn then.
    """
    updates: Updates = {
        "conversation": state.messages,
        "cancel": cancel,
        "problem": state.problem,
        "chat": _for_chatbot(state.messages),
        "status": state.status,
    }
    if state.draft is not None:
        updates["message"] = gr.update(value=state.draft)
    if buttons_unchanged:
        return updates
    idle = not state.running
    updates["key"] = key
    updates["kept"] = write_saved(key, state.messages) if key else ""
    updates["send"], updates["stop"] = gr.update(visible=idle), gr.update(visible=not idle)
    for name in IDLE_ONLY:
        updates[name] = gr.update(interactive=idle)
    for name in ("retry", "undo", "delete"):
        updates[name] = gr.update(interactive=idle and bool(state.messages))
    return updates


def _for_chatbot(messages: Conversation) -> list[Any]:
    """Convert a conversation to what the Chatbot takes."""
    shown = [{**message, "content": _as_markdown(message["content"])} for message in messages]
    return shown if takes_messages(gr.Chatbot) else to_pairs(shown)


def _as_markdown(text: str) -> str:
    """Keep what looks like a tag, outside code, from being taken for one and vanishing."""
    if not text:
        return "*(a reply without text)*"
    parts = CODE.split(text)  # every second part is code
    parts[::2] = [TAG.sub("&lt;", part.replace("&lt;", "&amp;lt;")) for part in parts[::2]]
    return "".join(parts)


def from_markdown(text: str) -> str:
    """Turn a message that was edited where it is shown back into what the model reads."""
    parts = CODE.split(text)
    parts[::2] = [WRITTEN.sub(lambda match: UNWRITTEN[match[0]], part) for part in parts[::2]]
    return "".join(parts)
