"""Hold a conversation, as a page shows it while a reply is written and afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ChatState", "Conversation", "Message", "undo_last", "with_system"]

Message = dict[str, str]
Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class ChatState:
    """A conversation at one moment.

    Attributes:
        messages: oldest first, without a system message; the reply so far is the last.
        status: one line about the reply.
        running: whether the reply goes on.
        draft: the text to put into the message box; None leaves what is there.
        warning: what to tell the user now, or "".
        problem: why there is no reply, and what to do; or "".
    """

    messages: Conversation = ()
    status: str = ""
    running: bool = False
    draft: str | None = None
    warning: str = ""
    problem: str = ""

    @property
    def reply(self) -> str:
        """The reply so far, or "" before its first text."""
        last = self.messages[-1] if self.messages else None
        return last["content"] if last and last["role"] == "assistant" else ""


def with_system(messages: Sequence[Message], system: str) -> list[Message]:
    """Put the system message first, where there is one."""
    first = [{"role": "system", "content": system}] if system.strip() else []
    return [*first, *messages]


def undo_last(messages: Sequence[Message]) -> tuple[Conversation, str]:
    """Remove the last question and its reply; return what is left, and the question."""
    users = (i for i, message in enumerate(messages) if message["role"] == "user")
    last = max(users, default=0)
    question = messages[last]["content"] if messages else ""
    return tuple(messages[:last]), question
