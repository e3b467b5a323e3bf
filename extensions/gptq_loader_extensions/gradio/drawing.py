"""Draw a reply: turn its moments into changes of the page's parts."""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio.conversation import Message, Moment, answer
from gptq_loader_extensions.gradio.versions import takes_messages, to_pairs
from gptq_loader_plugin.errors import GPTQLoaderError, PromptTooLong
from gptq_loader_plugin.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gptq_loader_plugin.loaded import LoadedModel

__all__ = ["Conversation", "Drawing", "drawn", "stream_reply"]

Conversation = tuple[Message, ...]
Drawing = tuple[Any, ...]

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
# Fenced code, to the end while its end is not yet written, and code within a line.
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
TAG = re.compile(r"<(?=[A-Za-z/!?])")

logger = logging.getLogger(__name__)


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
    """
    cancel = threading.Event()
    system, *chosen = values
    back = Moment(before, draft=draft)
    try:
        options = GenerateOptions.parse(dict(zip(OPTIONS, chosen, strict=True)))
        moments = answer(model, asked, options, system=system or "", cancel=cancel)
        for i, moment in enumerate(moments):
            if moment.warning:
                gr.Warning(escape(moment.warning))
            emptied = "" if i == 0 and draft is not None else moment.draft
            yield drawn(replace(moment, draft=emptied), cancel, steady=moment.running and i > 0)
    except PromptTooLong as error:
        hint = "shorten the message, or the system message"
        yield drawn(replace(back, problem=_sentences(error.message, hint)))
    except GPTQLoaderError as error:
        yield drawn(replace(back, problem=_sentences(error.message, error.hint)))
    except RuntimeError as error:  # torch's own: out of memory, a device that went away
        logger.exception("a reply failed")
        first = (str(error).splitlines() or [type(error).__name__])[0]
        hint = "shorten the conversation; the terminal says more"
        yield drawn(replace(back, problem=_sentences(f"the model failed: {first}", hint)))
    finally:
        cancel.set()


def drawn(
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
        moment.problem,
        _for_chatbot(moment.messages),
        same if moment.draft is None else gr.update(value=moment.draft),
        moment.status,
        *([same] * 5 if steady else buttons),
    )


def _for_chatbot(messages: Conversation) -> list[Any]:
    """Give a conversation as the Chatbot takes it."""
    shown = [{**it, "content": _as_markdown(it["content"])} for it in messages]
    return shown if takes_messages(gr.Chatbot) else to_pairs(shown)


def _as_markdown(text: str) -> str:
    """Keep what looks like a tag, outside code, from being taken for one and vanishing."""
    if not text:
        return "*(a reply without text)*"
    parts = CODE.split(text)  # every second part is code
    parts[::2] = [TAG.sub("&lt;", part) for part in parts[::2]]
    return "".join(parts)


def _sentences(message: str, hint: str) -> str:
    """Write an error as a person reads it: what is wrong, then what to do."""
    return ". ".join(f"{it[:1].upper()}{it[1:]}" for it in (message, hint)) + "."
