"""Hold a conversation, as a page shows it while a reply is written and afterwards."""

from __future__ import annotations

# pydantic reads the types of a model's fields, so these are imported for real.
from collections.abc import Sequence  # noqa: TC003
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

__all__ = [
    "ChatState",
    "Conversation",
    "Ended",
    "Message",
    "TextFile",
    "Version",
    "prompt_messages",
    "undo_last",
]

# Why a reply ended before the model ended it: "left" is a page that was closed or loaded again.
Ended = Literal["", "length", "context", "stopped", "left"]


class TextFile(BaseModel):
    """A text file that goes with a question.

    Attributes:
        name: its name, without a folder.
        text: what it says.
        tokens: how many tokens that is.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    text: str
    tokens: int = 0


class Version(BaseModel):
    """One text of a message.

    Attributes:
        content: the text.
        thought: what a model that thinks thought before it.
        seconds: how long it thought.
        ended: why it ended before its own end, or "".
    """

    model_config = ConfigDict(frozen=True)

    content: str = ""
    thought: str = ""
    seconds: float | None = None
    ended: Ended = ""


class Message(Version):
    """A message, of which a reply may have several versions.

    Attributes:
        role: who wrote it.
        files: what goes with a question.
        versions: all of them, where there are several; the fields are those of the one shown.
        shown: which of them is shown.
    """

    role: Literal["user", "assistant"]
    files: tuple[TextFile, ...] = ()
    versions: tuple[Version, ...] = ()
    shown: int = 0

    def version(self) -> Version:
        """Return the version that is shown."""
        return Version.model_validate(self.model_dump(include=set(Version.model_fields)))

    def add(self, version: Version) -> Message:
        """Show a new version, and keep the others."""
        versions = (*(self.versions or (self.version(),)), version)
        return self._with(version, versions=versions, shown=len(versions) - 1)

    def change(self, version: Version) -> Message:
        """Put a version in the place of the one that is shown."""
        versions = self.versions
        if versions:
            versions = (*versions[: self.shown], version, *versions[self.shown + 1 :])
        return self._with(version, versions=versions)

    def show(self, index: int) -> Message:
        """Show another version, the first or the last where there is none of that index."""
        if not self.versions:
            return self
        index = min(max(index, 0), len(self.versions) - 1)
        return self._with(self.versions[index], shown=index)

    def text(self) -> str:
        """Return what the model reads: the files, then the content."""
        files = [f"{file.name}:\n```\n{file.text.rstrip()}\n```" for file in self.files]
        return "\n\n".join([*files, self.content]) if files else self.content

    def _with(self, version: Version, **others: Any) -> Message:  # noqa: ANN401 - fields
        fields = {name: getattr(version, name) for name in Version.model_fields}
        return self.model_copy(update={**fields, **others})


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
        return last.content if last and last.role == "assistant" else ""


def prompt_messages(messages: Sequence[Message], system: str = "") -> list[dict[str, str]]:
    """Return what a template takes; a thought stands apart, for those templates that read it."""
    prompt = [{"role": "system", "content": system}] if system.strip() else []
    for message in messages:
        if message.role == "user" and prompt and prompt[-1]["role"] == "user":
            # a question that a reload left without a reply; templates take roles by turns
            prompt[-1]["content"] += f"\n\n{message.text()}"
            continue
        prompt.append({"role": message.role, "content": message.text()})
        if message.thought:
            prompt[-1]["reasoning_content"] = message.thought
    return prompt


def undo_last(messages: Sequence[Message]) -> tuple[Conversation, Message | None]:
    """Remove the last question and its reply; return what is left, and the question."""
    users = [i for i, message in enumerate(messages) if message.role == "user"]
    if not users:
        return (), None
    return tuple(messages[: users[-1]]), messages[users[-1]]
