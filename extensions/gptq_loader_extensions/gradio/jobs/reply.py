"""Write one reply, and say from moment to moment how it grows and how fast.

Nothing here knows the page: a prompt goes in, what to show comes out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio.jobs.models import Prompt, Ready

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_plugin.generation.generate import Finish, Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["Shown", "chat_prompt", "raw_prompt", "write_reply"]

# The eye sees no more than about 20 changes a second; every redraw sends the page a message.
REDRAW_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Shown:
    """A reply at one moment.

    Attributes:
        text: what is written so far.
        status: one line about it.
        model: the name of the model that writes; "" until it is its turn.
        finish: why it ended, or None while it goes on.
        warning: what to tell the user now, or "".
    """

    text: str
    status: str
    model: str = ""
    finish: Finish | None = None
    warning: str = ""


def write_reply(
    models: Models,
    prepare: Callable[[LoadedModel], Prompt],
    options: GenerateOptions,
    *,
    cancel: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Shown]:
    """Write a reply; the last of what is given has a `finish`.

    Args:
        models: answers.
        prepare: makes the prompt.
        options: how to sample.
        cancel: ends the reply once it is set.
        clock: tells seconds.

    Raises:
        GPTQLoaderError: no model is loaded, or the prompt does not fit it.
    """
    began = drawn = clock()
    first: tuple[float, int] | None = None
    text = ""
    yield Shown("", "Reading the prompt …")
    ready = Ready("", 0, 0)
    for event in models.ask(prepare, options, cancel):
        if isinstance(event, Ready):
            ready = event
            yield Shown("", "Reading the prompt …", ready.model, warning=ready.warning)
            continue
        now = clock()
        text += event.text
        first = first or (now, event.tokens)
        if event.finish is None and now - drawn < REDRAW_SECONDS:
            continue
        drawn = now
        status = _counted(event.tokens, ready, began=began, first=first, now=now)
        ended = _ended(event, options) if event.finish else ""
        yield Shown(text, status + ended, ready.model, event.finish)


def chat_prompt(messages: Sequence[Mapping[str, str]]) -> Callable[[LoadedModel], Prompt]:
    """Make a prompt of messages by the model's template; the oldest turns go where it is full."""

    def prepare(model: LoadedModel) -> Prompt:
        ids, warning = model.encode_chat(messages, when_too_long="drop-oldest")
        return Prompt(ids, model.template.stop, warning)

    return prepare


def raw_prompt(text: str) -> Callable[[LoadedModel], Prompt]:
    """Make a prompt of a text as it was typed; special tokens in it count."""
    return lambda model: Prompt(model.encode(text))


def _counted(
    tokens: int, ready: Ready, *, began: float, first: tuple[float, int], now: float
) -> str:
    """Say how many tokens there are and how fast they come; the prompt's reading counts apart."""
    seconds, count = now - first[0], tokens - first[1]
    words = f"{tokens:,} {'token' if tokens == 1 else 'tokens'}"
    if count and seconds > 0:
        words += f", {count / seconds:.1f} a second"
    used = ready.prompt_tokens + tokens
    return (
        f"{words}; the first after {first[0] - began:.2f} s; "
        f"{used:,} of {ready.context:,} of the context used"
    )


def _ended(piece: Piece, options: GenerateOptions) -> str:
    """Say why a reply ended, where it did not end by itself."""
    if piece.finish == "cancelled":
        return "; stopped"
    if piece.finish != "length":
        return ""
    if piece.tokens >= options.max_new_tokens:
        return "; cut off at the most new tokens"
    return "; cut off where the context is full"
