"""Write one reply, and show how it grows and how fast.

Nothing here knows the page: a prompt goes in, states of the conversation come out.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio.jobs.conversation import ChatState, with_system
from gptq_loader_extensions.gradio.jobs.models import EncodedPrompt, ReplyStart

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from gptq_loader_extensions.gradio.jobs.conversation import Conversation, Message
    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["chat_prompt", "raw_prompt", "write_reply"]

# The eye sees no more than about 20 changes a second; every redraw sends the page a message.
REDRAW_SECONDS = 0.05


def write_reply(
    models: Models,
    prepare: Callable[[LoadedModel], EncodedPrompt],
    options: GenerateOptions,
    *,
    messages: Conversation = (),
    cancel: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ChatState]:
    """Write a reply; yield the conversation as it grows, until it is no longer running.

    A reply that is cancelled keeps the text it has. Without any text there is no reply: the
    question, which is the last message, goes back into the message box.

    Args:
        models: generates the reply.
        prepare: makes the prompt.
        options: how to sample.
        messages: the conversation that the reply is added to, the question last.
        cancel: ends the reply once it is set.
        clock: returns seconds.

    Raises:
        GPTQLoaderError: no model is loaded, or the prompt does not fit it.
    """
    began = shown = clock()
    first: tuple[float, int] | None = None
    text = ""
    reading = ChatState(messages, "Reading the prompt …", running=True)
    yield reading
    start = ReplyStart(0, 0)
    for event in models.stream(prepare, options, cancel):
        if isinstance(event, ReplyStart):
            start = event
            yield replace(reading, warning=event.warning)
            continue
        now = clock()
        text += event.text
        first = first or (now, event.tokens)
        if event.finish is None and now - shown < REDRAW_SECONDS:
            continue
        shown = now
        if event.finish == "cancelled" and messages and not text:
            yield ChatState(messages[:-1], "Stopped.", draft=messages[-1]["content"])
            return
        status = _speed(event.tokens, start, began=began, first=first, now=now)
        status += _why_ended(event, options) if event.finish else ""
        reply = ({"role": "assistant", "content": text},) if text or event.finish else ()
        yield ChatState((*messages, *reply), status, running=event.finish is None)


def chat_prompt(
    messages: Sequence[Message], system: str = ""
) -> Callable[[LoadedModel], EncodedPrompt]:
    """Make a prompt of messages by the model's template; the oldest turns go where it is full."""

    def prepare(model: LoadedModel) -> EncodedPrompt:
        ids, warning = model.encode_chat(with_system(messages, system), when_too_long="drop-oldest")
        return EncodedPrompt(ids, model.template.stop, warning)

    return prepare


def raw_prompt(text: str) -> Callable[[LoadedModel], EncodedPrompt]:
    """Make a prompt of a text as it was typed; special tokens in it count."""
    return lambda model: EncodedPrompt(model.encode(text))


def _speed(
    tokens: int, start: ReplyStart, *, began: float, first: tuple[float, int], now: float
) -> str:
    """Describe how many tokens there are and how fast they come; reading the prompt is apart."""
    seconds, count = now - first[0], tokens - first[1]
    speed = f"{tokens:,} {'token' if tokens == 1 else 'tokens'}"
    if count and seconds > 0:
        speed += f", {count / seconds:.1f} a second"
    used = start.prompt_tokens + tokens
    return (
        f"{speed}; the first after {first[0] - began:.2f} s; "
        f"{used:,} of {start.context:,} of the context used"
    )


def _why_ended(piece: Piece, options: GenerateOptions) -> str:
    """Describe why a reply ended, where it did not end by itself."""
    if piece.finish == "cancelled":
        return "; stopped"
    if piece.finish != "length":
        return ""
    if piece.tokens >= options.max_new_tokens:
        return "; cut off at the most new tokens"
    return "; cut off where the context is full"
