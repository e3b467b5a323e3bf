"""Check the messages of a conversation before any template sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gptq_loader_plugin.errors import TemplateError

__all__ = ["ROLES", "Message", "check_messages", "check_text", "drop_oldest"]

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")
EXAMPLE = 'write {"role": "user", "content": "..."}'


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages with plain texts as contents; parts of text are joined by newlines.

    Raises:
        TemplateError: there are none, or one of them is not a message.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TemplateError(
            f"messages are a list, and this is {_kind(messages)}", hint=f"{EXAMPLE}, in a list"
        )
    if not messages:
        raise TemplateError("there are no messages", hint=EXAMPLE)
    checked = [_check(message, i) for i, message in enumerate(messages)]
    for i, message in enumerate(checked):
        check_text(message["content"], f"the content of message {i}")
    return checked


def check_text(text: str, what: str) -> None:
    """Refuse half a character, as bytes that are no UTF-8 leave behind; no tokenizer takes it.

    Raises:
        TemplateError: there is one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TemplateError(
            f"{what} is no valid text: its character {error.start:,} is half of one",
            hint="send valid UTF-8",
        ) from error


def _check(message: Message, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TemplateError(f"message {index} is {_kind(message)}", hint=EXAMPLE)
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise TemplateError(
            f"message {index} has the role {role!r}", hint=f"name one of {', '.join(ROLES)}"
        )
    if isinstance(content, list | tuple):
        return {**message, "content": "\n".join(_text(part, index) for part in content)}
    if not isinstance(content, str):
        raise TemplateError(
            f"the content of message {index} is {_kind(content)}, and must be text", hint=EXAMPLE
        )
    return dict(message)


def _text(part: object, index: int) -> str:
    """Take the text of one part, as OpenAI's API sends them."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(text, str):
        raise TemplateError(
            f"the content of message {index} has a part of the kind {kind or _kind(part)!r}",
            hint='send text alone: {"type": "text", "text": "..."}',
        )
    return text


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def drop_oldest(messages: list[Mapping[str, Any]]) -> bool:
    """Leave out the oldest turn, but for a system message; return False where it is the last."""
    first = 1 if messages and messages[0].get("role") == "system" else 0
    following = (i for i in range(first + 1, len(messages)) if messages[i].get("role") == "user")
    second = next(following, None)
    if second is not None:
        del messages[first:second]
    return second is not None
