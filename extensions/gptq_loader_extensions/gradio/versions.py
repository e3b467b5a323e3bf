"""Bridge the versions of gradio: options come and go, and so does the shape of a conversation."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["known", "takes_messages", "to_pairs"]


def known(function: Callable[..., object], **options: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return those of the options that this version of `function` takes."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


def takes_messages(chatbot: type) -> bool:
    """Return whether this Chatbot takes messages; before 4.44 it takes only pairs."""
    names = inspect.signature(chatbot).parameters
    return "type" in names or "allow_tags" in names


def to_pairs(messages: Sequence[Mapping[str, str]]) -> list[tuple[str | None, str | None]]:
    """Convert messages to the pairs of question and reply that an old Chatbot takes."""
    pairs: list[tuple[str | None, str | None]] = []
    for message in messages:
        if message["role"] == "user":
            pairs.append((message["content"], None))
        elif pairs:
            pairs[-1] = (pairs[-1][0], message["content"])
    return pairs
