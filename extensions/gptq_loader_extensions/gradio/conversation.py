"""Run one reply of a chat, and say from moment to moment what a page shows of it.

Nothing here knows the page: a conversation goes in, moments come out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from gptq_loader_plugin.generate import Piece
    from gptq_loader_plugin.loaded import LoadedModel
    from gptq_loader_plugin.options import GenerateOptions

__all__ = ["Message", "Moment", "answer", "take_back"]

Message = dict[str, str]

# The eye sees no more than about 20 changes a second; every redraw sends the page a message.
REDRAW_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Moment:
    """What a page shows at one moment.

    Attributes:
        messages: the conversation so far, oldest first, without a system message.
        status: one line about the reply.
        running: whether the reply goes on.
        draft: the text to put into the message box; None leaves what is there.
        warning: what to tell the user now, or "".
        problem: why there is no reply, and what to do; or "".
    """

    messages: tuple[Message, ...]
    status: str = ""
    running: bool = False
    draft: str | None = None
    warning: str = ""
    problem: str = ""


def answer(
    model: LoadedModel,
    messages: Sequence[Message],
    options: GenerateOptions,
    *,
    system: str,
    cancel: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Moment]:
    """Answer the last message.

    A reply that is cancelled keeps the text it has; one without any text goes, and its question
    returns to the message box.

    Args:
        model: answers.
        messages: the conversation, a user's message last.
        options: how to sample.
        system: the system message, or "" for none.
        cancel: ends the reply once it is set.
        clock: tells seconds.

    Raises:
        GPTQLoaderError: the messages fit neither the context nor the template.
    """
    asked = tuple(messages)
    began = drawn = clock()
    first: tuple[float, int] | None = None
    text = ""
    yield Moment(asked, "Reading the prompt …", running=True)
    prompt = [{"role": "system", "content": system}, *asked] if system.strip() else [*asked]
    for piece in model.chat(prompt, options, when_too_long="drop-oldest", cancel=cancel):
        now = clock()
        text += piece.text
        first = first or (now, piece.tokens)
        if piece.finish is None and not piece.warning and now - drawn < REDRAW_SECONDS:
            continue
        drawn = now
        status = _counted(piece.tokens, began=began, first=first, now=now)
        if piece.finish is None:
            yield Moment(_with(asked, text), status, running=True, warning=piece.warning)
        elif not text and piece.finish == "cancelled":
            yield Moment(asked[:-1], "Stopped.", draft=asked[-1]["content"])
        else:
            status += _ended(piece, options)
            yield Moment(_with(asked, text), status, warning=piece.warning)


def take_back(messages: Sequence[Message]) -> tuple[tuple[Message, ...], str]:
    """Take the last question and its reply out of a conversation; give what is left, and it."""
    at = max((i for i, it in enumerate(messages) if it["role"] == "user"), default=0)
    question = messages[at]["content"] if messages else ""
    return tuple(messages[:at]), question


def _with(messages: tuple[Message, ...], reply: str) -> tuple[Message, ...]:
    return (*messages, {"role": "assistant", "content": reply})


def _counted(tokens: int, *, began: float, first: tuple[float, int], now: float) -> str:
    """Say how many tokens there are and how fast they come; the prompt's reading counts apart."""
    seconds, count = now - first[0], tokens - first[1]
    words = f"{tokens:,} {'token' if tokens == 1 else 'tokens'}"
    if count and seconds > 0:
        words += f", {count / seconds:.1f} a second"
    return f"{words}; the first after {first[0] - began:.2f} s"


def _ended(piece: Piece, options: GenerateOptions) -> str:
    """Say why a reply ended, where it did not end by itself."""
    if piece.finish == "cancelled":
        return "; stopped"
    if piece.finish != "length":
        return ""
    if piece.tokens >= options.max_new_tokens:
        return "; cut off at the most new tokens"
    return "; cut off where the context is full"
