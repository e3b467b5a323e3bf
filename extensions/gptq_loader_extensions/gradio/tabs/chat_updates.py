"""Show the chat: turn its states into updates of the page's components, by their names."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio.error_messages import format_error
from gptq_loader_extensions.gradio.jobs.conversation import ChatState, prompt_messages
from gptq_loader_extensions.gradio.jobs.reply import chat_prompt, write_reply
from gptq_loader_extensions.gradio.tabs.message_view import as_markdown
from gptq_loader_extensions.gradio.tabs.panel_values import read_settings
from gptq_loader_extensions.gradio.tabs.saved_chats import write_saved
from gptq_loader_extensions.gradio.versions import takes_messages, to_pairs
from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gptq_loader_extensions.gradio.jobs.conversation import Conversation, Message
    from gptq_loader_extensions.gradio.jobs.models import Models

__all__ = ["ReplyRequest", "Updates", "render", "stream_updates"]

Updates = dict[str, Any]

# What a person may do between two replies, and not during one.
IDLE_ONLY = ("continue", "retry", "undo", "new", "prompt")
# The browser keeps a reply that is being written this often: what a reload may lose.
KEEP_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class ReplyRequest:
    """A reply to be written.

    Attributes:
        messages: the conversation, the question last.
        before: the conversation to go back to on an error.
        key: the conversation's key in the browser.
        earlier: the reply of which it is another version, or which goes on.
        continues: whether that goes on.
        draft: the text to put back into the message box on an error.
    """

    messages: Conversation
    before: Conversation
    key: str
    earlier: Message | None = None
    continues: bool = False
    draft: str | None = None

    def prompt(self, system: str) -> list[dict[str, str]]:
        """Return the messages that the model reads."""
        going_on = (self.earlier,) if self.continues and self.earlier else ()
        return prompt_messages((*self.messages, *going_on), system)


def stream_updates(
    models: Models,
    request: ReplyRequest,
    values: Sequence[Any],
    *,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Updates]:
    """Stream a reply as updates of the page; on an error, restore it and say what is wrong.

    Args:
        models: generates the reply.
        request: what to write.
        values: the settings' values, in their order.
        clock: returns seconds.
    """
    cancel = threading.Event()
    kept = clock()
    try:
        settings = read_settings(values)
        prepare = chat_prompt(
            request.prompt(settings.system), settings, continues=request.continues
        )
        states = write_reply(
            models,
            prepare,
            settings.options,
            messages=request.messages,
            earlier=request.earlier,
            continues=request.continues,
            cancel=cancel,
        )
        for i, state in enumerate(states):
            if state.warning:
                gr.Warning(escape(state.warning))
            unchanged = state.running and i > 1  # the second, too, names the buttons: see events.py
            sent = i == 0 and request.draft is not None  # and leaves the message box
            shown = replace(state, draft="") if sent else state
            updates = render(shown, cancel, key=request.key, buttons_unchanged=unchanged)
            if unchanged and clock() - kept > KEEP_SECONDS:
                kept = clock()
                updates["kept"] = write_saved(request.key, _as_left(state.messages))
            yield updates
    except (GPTQLoaderError, MemoryError, RuntimeError) as error:  # torch's own are RuntimeErrors
        problem = format_error(error, hint="shorten the conversation; the terminal says more")
        state = ChatState(request.before, draft=request.draft, problem=problem)
        yield render(state, key=request.key)
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
        "chat": _for_chatbot(state.messages, running=state.running),
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
    for name in ("retry", "undo"):
        updates[name] = gr.update(interactive=idle and bool(state.messages))
    replied = bool(state.messages) and state.messages[-1].role == "assistant"
    updates["continue"] = gr.update(interactive=idle and replied)
    return updates


def _as_left(messages: Conversation) -> Conversation:
    """Mark a reply as one that was left while it was written: it is, if nothing follows."""
    if not messages or messages[-1].role != "assistant":
        return messages
    last = messages[-1]
    return (*messages[:-1], last.change(last.version().model_copy(update={"ended": "left"})))


def _for_chatbot(messages: Conversation, *, running: bool) -> list[Any]:
    """Convert a conversation to what the Chatbot takes."""
    shown = [
        {
            "role": message.role,
            "content": as_markdown(message, running=running and i == len(messages) - 1),
        }
        for i, message in enumerate(messages)
    ]
    return shown if takes_messages(gr.Chatbot) else to_pairs(shown)
