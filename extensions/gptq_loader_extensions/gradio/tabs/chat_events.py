"""Update the Chat tab when a person does something."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
from collections.abc import Iterator  # noqa: TC003
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio.jobs.conversation import ChatState, Conversation, undo_last
from gptq_loader_extensions.gradio.tabs.chat_updates import (
    Updates,
    from_markdown,
    render,
    stream_updates,
)
from gptq_loader_extensions.gradio.tabs.header import header_html
from gptq_loader_extensions.gradio.tabs.saved_chats import new_key, read_saved

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.tabs.saved_chats import SavedTitle

__all__ = ["NEW_CONVERSATION", "ChatEvents"]

NEW_CONVERSATION = ("New conversation", "")

ComponentUpdates = dict[Any, Any]  # the components that change, each with its new value


class ChatEvents:
    """What happens in the tab.

    Args:
        models: generates the replies.
        parts: the tab's components by name; `header` is the page's.
    """

    def __init__(self, models: Models, parts: Mapping[str, Any]) -> None:
        self._models = models
        self._parts = parts

    def send(
        self,
        text: str,
        messages: Conversation,
        key: str,
        *values: Any,  # noqa: ANN401
    ) -> Iterator[ComponentUpdates]:
        """Ask a question."""
        if not text.strip():
            yield self._by_component(render(ChatState(messages), key=key))
            return
        request = (*messages, {"role": "user", "content": text})
        yield from self._stream(request, values, key or new_key(), before=messages, draft=text)

    def retry(
        self,
        messages: Conversation,
        key: str,
        *values: Any,  # noqa: ANN401
    ) -> Iterator[ComponentUpdates]:
        """Ask the last question again."""
        earlier, question = undo_last(messages)
        request = (*earlier, {"role": "user", "content": question})
        yield from self._stream(request, values, key, before=messages)

    def edit(
        self,
        change: gr.EditData,
        messages: Conversation,
        key: str,
        *values: Any,  # noqa: ANN401
    ) -> Iterator[ComponentUpdates]:
        """Change a message: a question is asked again as it is now, a reply stays as it is now."""
        at = change.index if isinstance(change.index, int) else change.index[0]
        edited = {"role": messages[at]["role"], "content": from_markdown(str(change.value))}
        if edited["role"] == "assistant":
            now = (*messages[:at], edited, *messages[at + 1 :])
            yield self._by_component(render(ChatState(now), key=key))
            return
        yield from self._stream((*messages[:at], edited), values, key, before=messages)

    def undo(self, messages: Conversation, key: str) -> ComponentUpdates:
        """Move the last question back into the message box, and remove its reply."""
        earlier, question = undo_last(messages)
        return self._by_component(render(ChatState(earlier, draft=question), key=key))

    def empty(self) -> ComponentUpdates:
        """Begin a new conversation."""
        return self._by_component(render(ChatState()))

    def opened(self, text: str, *_: Any) -> ComponentUpdates:  # noqa: ANN401
        """Show a conversation that the browser has stored."""
        saved = read_saved(text)
        chat = saved.opened
        messages, key = (chat.conversation(), chat.key) if chat else ((), "")
        # not sent to the browser again, which has it
        updates = {**render(ChatState(messages), key=key), "kept": gr.update()}
        updates["picker"] = _choices(saved.listed, key)
        return self._by_component(updates)

    def listed(self, text: str) -> Any:  # noqa: ANN401 - an update of a component
        """List the conversations, once the browser has stored one."""
        saved = read_saved(text)
        if saved.full:
            gr.Warning("The storage of this browser is full: this conversation is not saved.")
        return _choices(saved.listed, saved.current)

    def deleted(self, text: str, *_: Any) -> ComponentUpdates:  # noqa: ANN401
        """Begin a new conversation in place of one that the browser has deleted."""
        return {**self.empty(), self._parts["picker"]: _choices(read_saved(text).listed, "")}

    def _stream(
        self,
        request: Conversation,
        values: Sequence[Any],
        key: str,
        *,
        before: Conversation,
        draft: str | None = None,
    ) -> Iterator[ComponentUpdates]:
        stream = stream_updates(self._models, request, values, key=key, before=before, draft=draft)
        for i, updates in enumerate(stream):
            # another browser may have changed the model since this page was drawn
            header = {"header": header_html(self._models.loaded)} if i == 1 else {}
            yield self._by_component(updates | header)

    def _by_component(self, updates: Updates) -> ComponentUpdates:
        return {self._parts[name]: value for name, value in updates.items()}


def _choices(listed: Sequence[SavedTitle], key: str) -> Any:  # noqa: ANN401 - an update of a component
    choices = [(chat.title or "…", chat.key) for chat in listed]
    known = key in [chat.key for chat in listed]
    first = [] if known else [NEW_CONVERSATION]
    return gr.update(choices=[*first, *choices], value=key if known else "")
