"""Write and read conversations as the browser stores them.

They are in the browser's own storage (`page.js`), each under its own key, and never on the server:
people who share a page do not share conversations. What comes back from there is validated.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_extensions.gradio.jobs.conversation import Conversation, Message

__all__ = ["SavedConversation", "SavedList", "new_key", "read_saved", "write_saved"]

TITLE_LENGTH = 48
Key = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]


class SavedMessage(BaseModel):
    """A message of a saved conversation."""

    model_config = ConfigDict(frozen=True)

    role: Literal["user", "assistant"]
    content: str


class SavedConversation(BaseModel):
    """A conversation as the browser stores it."""

    model_config = ConfigDict(frozen=True)

    key: Key
    title: str = ""
    messages: tuple[SavedMessage, ...] = ()

    def conversation(self) -> Conversation:
        """Convert it to the chat's own form."""
        return tuple(message.model_dump() for message in self.messages)


class SavedTitle(BaseModel):
    """A line of the list of conversations."""

    model_config = ConfigDict(frozen=True)

    key: Key
    title: str


class SavedList(BaseModel):
    """What the browser has stored: the newest first.

    Attributes:
        current: the conversation of this tab, or "".
        listed: all of them.
        opened: the conversation to show, or None.
        full: whether the browser had no room for the last one.
    """

    model_config = ConfigDict(frozen=True)

    current: str = ""
    listed: tuple[SavedTitle, ...] = ()
    opened: SavedConversation | None = None
    full: bool = False


def new_key() -> str:
    """Make a conversation's key."""
    return secrets.token_hex(8)


def write_saved(key: str, messages: Sequence[Message]) -> str:
    """Write a conversation for the browser, which deletes one without messages."""
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    title = " ".join(question.split())
    if len(title) > TITLE_LENGTH:
        title = f"{title[: TITLE_LENGTH - 1].rstrip()}…"
    saved = [SavedMessage.model_validate(message) for message in messages]
    return SavedConversation(key=key, title=title, messages=tuple(saved)).model_dump_json()


def read_saved(text: str | None) -> SavedList:
    """Read what the browser has stored; what is not valid counts as nothing."""
    try:
        return SavedList.model_validate_json(text or "{}")
    except ValidationError:
        return SavedList()
