"""Write and read conversations as the browser stores them.

They are in the browser's own storage (`chats.js`), each under its own key, and never on the server:
people who share a page do not share conversations. What comes back from there is validated.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_loader_extensions.gradio.jobs.conversation import Message  # noqa: TC001 - pydantic's
from gptq_loader_extensions.gradio.tabs.panel_values import PanelValues  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SavedConversation", "StoredConversation", "new_key", "read_stored", "write_saved"]

TITLE_LENGTH = 48
Key = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
MARKDOWN = re.compile(
    r"^\s*(?:#{1,6}|>|[-*+]|\d+[.)])\s+|[*_`~]+|!?\[([^\]]*)\]\([^)]*\)", re.MULTILINE
)


class SavedConversation(BaseModel):
    """A conversation as the browser stores it."""

    model_config = ConfigDict(frozen=True)

    key: Key
    title: str = ""
    messages: tuple[Message, ...] = ()


class StoredConversation(BaseModel):
    """What the browser has stored, to be shown.

    Attributes:
        opened: the conversation, or None for a new one.
        panel: the settings that belong to it.
    """

    model_config = ConfigDict(frozen=True)

    opened: SavedConversation | None = None
    panel: PanelValues | None = None


def new_key() -> str:
    """Make a conversation's key."""
    return secrets.token_hex(8)


def write_saved(key: str, messages: Sequence[Message]) -> str:
    """Write a conversation for the browser, which deletes one without messages."""
    return SavedConversation(
        key=key, title=title_of(messages), messages=tuple(messages)
    ).model_dump_json(exclude_defaults=True)


def title_of(messages: Sequence[Message]) -> str:
    """Make a conversation's title of its first question, without the marks of Markdown."""
    question = next((message.content for message in messages if message.role == "user"), "")
    title = " ".join(MARKDOWN.sub(r"\1", question[:1000]).split())
    if len(title) > TITLE_LENGTH:
        title = f"{title[: TITLE_LENGTH - 1].rstrip()}…"
    return title


def read_stored(text: str | None) -> StoredConversation:
    """Read what the browser has stored; what is not valid counts as nothing."""
    try:
        return StoredConversation.model_validate_json(text or "{}")
    except ValidationError:
        return StoredConversation()
