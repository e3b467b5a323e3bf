"""Write and read conversations as the browser keeps them.

They are in the browser's own storage (`page.js`), each under its own key, and never on the server:
who shares a page does not share conversations. What comes back from there is checked.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_extensions.gradio.jobs.conversation import Message

__all__ = ["KeptConversation", "KeptList", "new_key", "read_list", "write_kept"]

TITLE_LENGTH = 48
Key = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class KeptMessage(BaseModel):
    """A message of a kept conversation."""

    model_config = ConfigDict(frozen=True)

    role: Literal["user", "assistant"]
    content: str


class KeptConversation(BaseModel):
    """A conversation as the browser keeps it."""

    model_config = ConfigDict(frozen=True)

    key: Key
    title: str = ""
    messages: tuple[KeptMessage, ...] = ()

    def talk(self) -> tuple[Message, ...]:
        """Give the messages as the chat takes them."""
        return tuple(it.model_dump() for it in self.messages)


class KeptTitle(BaseModel):
    """A line of the list of conversations."""

    model_config = ConfigDict(frozen=True)

    key: Key
    title: str


class KeptList(BaseModel):
    """What the browser says it keeps: the newest first.

    Attributes:
        current: the conversation of this tab, or "".
        listed: all of them.
        opened: the conversation to show, or None.
        full: whether the browser had no room for the last one.
    """

    model_config = ConfigDict(frozen=True)

    current: str = ""
    listed: tuple[KeptTitle, ...] = ()
    opened: KeptConversation | None = None
    full: bool = False


def new_key() -> str:
    """Make a conversation's key."""
    return secrets.token_hex(8)


def write_kept(key: str, messages: Sequence[Message]) -> str:
    """Write a conversation for the browser; one without messages is forgotten there."""
    question = next((it["content"] for it in messages if it["role"] == "user"), "")
    title = " ".join(question.split())
    if len(title) > TITLE_LENGTH:
        title = f"{title[: TITLE_LENGTH - 1].rstrip()}…"
    kept = [KeptMessage.model_validate(it) for it in messages]
    return KeptConversation(key=key, title=title, messages=tuple(kept)).model_dump_json()


def read_list(text: str | None) -> KeptList:
    """Read what the browser keeps; what cannot be read is as if it kept nothing."""
    try:
        return KeptList.model_validate_json(text or "{}")
    except ValidationError:
        return KeptList()
