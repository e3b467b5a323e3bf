"""Run one reply of a chat, and say from moment to moment what a page shows of it.

Nothing here knows the page: a conversation goes in, moments come out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio.jobs.reply import chat_prompt, write_reply

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["Message", "Moment", "answer", "take_back", "with_system"]

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Moment:
    """What a page shows at one moment.

    Attributes:
        messages: the conversation so far, oldest first, without a system message.
        status: one line about the reply.
        running: whether the reply goes on.
        draft: the text to put into the message box; None leaves what is there.
        model: the name of the model that answers, once it is its turn.
        warning: what to tell the user now, or "".
        problem: why there is no reply, and what to do; or "".
    """

    messages: tuple[Message, ...]
    status: str = ""
    running: bool = False
    draft: str | None = None
    model: str = ""
    warning: str = ""
    problem: str = ""


def answer(
    models: Models,
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
        models: answers.
        messages: the conversation, a user's message last.
        options: how to sample.
        system: the system message, or "" for none.
        cancel: ends the reply once it is set.
        clock: tells seconds.

    Raises:
        GPTQLoaderError: no model is loaded, or the messages do not fit its context or template.
    """
    asked = tuple(messages)
    prepare = chat_prompt(with_system(asked, system))
    for shown in write_reply(models, prepare, options, cancel=cancel, clock=clock):
        running = shown.finish is None
        if shown.finish == "cancelled" and not shown.text:
            yield Moment(asked[:-1], "Stopped.", draft=asked[-1]["content"], model=shown.model)
            return
        begun = bool(shown.text) or not running
        talk = (*asked, {"role": "assistant", "content": shown.text}) if begun else asked
        yield Moment(talk, shown.status, running=running, model=shown.model, warning=shown.warning)


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """Put the system message first, where there is one."""
    first = [{"role": "system", "content": system}] if system.strip() else []
    return [*first, *messages]


def take_back(messages: Sequence[Message]) -> tuple[tuple[Message, ...], str]:
    """Take the last question and its reply out of a conversation; give what is left, and it."""
    at = max((i for i, it in enumerate(messages) if it["role"] == "user"), default=0)
    question = messages[at]["content"] if messages else ""
    return tuple(messages[:at]), question
