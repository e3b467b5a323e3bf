"""Say what changes in the Chat tab when a person does something."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
from collections.abc import Iterator  # noqa: TC003
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio.jobs.conversation import Moment, take_back
from gptq_loader_extensions.gradio.tabs.chat_updates import (
    Conversation,
    Drawing,
    drawn,
    from_markdown,
    stream_reply,
)
from gptq_loader_extensions.gradio.tabs.header import head
from gptq_loader_extensions.gradio.tabs.saved_chats import new_key, read_list

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.tabs.saved_chats import KeptTitle

__all__ = ["NEW_CONVERSATION", "ChatEvents"]

NEW_CONVERSATION = ("New conversation", "")

Changes = dict[Any, Any]  # the components that change, each with its new value


class ChatEvents:
    """What happens in the tab.

    Args:
        models: answers.
        parts: the tab's components by name; `about` is the page's head.
    """

    def __init__(self, models: Models, parts: Mapping[str, Any]) -> None:
        self._models = models
        self._parts = parts

    def send(self, text: str, talk: Conversation, key: str, *values: Any) -> Iterator[Changes]:  # noqa: ANN401
        """Ask a question."""
        if not text.strip():
            yield self._changes(drawn(Moment(talk), key=key))
            return
        asked = (*talk, {"role": "user", "content": text})
        yield from self._stream(asked, values, key or new_key(), before=talk, draft=text)

    def retry(self, talk: Conversation, key: str, *values: Any) -> Iterator[Changes]:  # noqa: ANN401
        """Ask the last question again."""
        kept, question = take_back(talk)
        asked = (*kept, {"role": "user", "content": question})
        yield from self._stream(asked, values, key, before=talk)

    def edit(
        self,
        change: gr.EditData,
        talk: Conversation,
        key: str,
        *values: Any,  # noqa: ANN401
    ) -> Iterator[Changes]:
        """Change a message: a question is asked again as it is now, a reply stays as it is now."""
        at = change.index if isinstance(change.index, int) else change.index[0]
        edited = {"role": talk[at]["role"], "content": from_markdown(str(change.value))}
        if edited["role"] == "assistant":
            now = (*talk[:at], edited, *talk[at + 1 :])
            yield self._changes(drawn(Moment(now), key=key))
            return
        yield from self._stream((*talk[:at], edited), values, key, before=talk)

    def undo(self, talk: Conversation, key: str) -> Changes:
        """Take the last question back into the message box, and its reply away."""
        kept, question = take_back(talk)
        return self._changes(drawn(Moment(kept, draft=question), key=key))

    def empty(self) -> Changes:
        """Begin a new conversation."""
        return self._changes(drawn(Moment(())))

    def opened(self, text: str, *_: Any) -> Changes:  # noqa: ANN401
        """Show a conversation that the browser kept."""
        found = read_list(text)
        shown = found.opened
        talk, key = (shown.talk(), shown.key) if shown else ((), "")
        # not told to the browser again, which has it
        change = {**drawn(Moment(talk), key=key), "kept": gr.update()}
        change["picker"] = _choices(found.listed, key)
        return self._changes(change)

    def listed(self, text: str) -> Any:  # noqa: ANN401 - a change of a component
        """List the conversations, once the browser has kept one."""
        found = read_list(text)
        if found.full:
            gr.Warning("This browser has no room left: this conversation is not kept in it.")
        return _choices(found.listed, found.current)

    def forgotten(self, text: str, *_: Any) -> Changes:  # noqa: ANN401
        """Begin a new conversation in place of one that the browser has forgotten."""
        return {**self.empty(), self._parts["picker"]: _choices(read_list(text).listed, "")}

    def _stream(
        self,
        asked: Conversation,
        values: Sequence[Any],
        key: str,
        *,
        before: Conversation,
        draft: str | None = None,
    ) -> Iterator[Changes]:
        replies = stream_reply(self._models, asked, values, key=key, before=before, draft=draft)
        for i, drawing in enumerate(replies):
            # another browser may have changed the model since this page was drawn
            about = {"about": head(self._models.loaded)} if i == 1 else {}
            yield self._changes(drawing | about)

    def _changes(self, drawing: Drawing) -> Changes:
        return {self._parts[name]: value for name, value in drawing.items()}


def _choices(listed: Sequence[KeptTitle], key: str) -> Any:  # noqa: ANN401 - a change of a component
    choices = [(it.title or "…", it.key) for it in listed]
    known = key in [it.key for it in listed]
    first = [] if known else [NEW_CONVERSATION]
    return gr.update(choices=[*first, *choices], value=key if known else "")
