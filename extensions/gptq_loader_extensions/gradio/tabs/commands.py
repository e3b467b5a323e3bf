"""Read what the page's scripts ask the server to do with a conversation."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from gptq_loader_extensions.gradio.jobs.conversation import TextFile  # noqa: TC001 - pydantic's
from gptq_loader_extensions.gradio.tabs.saved_chats import StoredConversation  # noqa: TC001

__all__ = ["Command", "read_command"]


class Command(BaseModel):
    """What a person did to something that a script draws.

    Attributes:
        do: what: "open" a stored conversation, "new" one, "import" one from a file's text, show
            another "version" of a reply, "edit" a message, "attach" files and "detach" one.
        at: which message, or which file.
        shown: which version.
        text: what a message says now, or a file.
        stored: the conversation to open.
        files: the files to attach.
    """

    model_config = ConfigDict(frozen=True)

    do: Literal["open", "new", "import", "version", "edit", "attach", "detach", ""] = ""
    at: int = 0
    shown: int = 0
    text: str = ""
    stored: StoredConversation | None = None
    files: tuple[TextFile, ...] = ()


def read_command(text: str | None) -> Command:
    """Read a command; what is not valid does nothing."""
    try:
        return Command.model_validate_json(text or "{}")
    except ValidationError:
        return Command()
