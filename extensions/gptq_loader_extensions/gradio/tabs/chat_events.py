"""Update the Chat tab when a person does something."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
from collections.abc import Iterator  # noqa: TC003
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.gradio.error_messages import format_error
from gptq_loader_extensions.gradio.jobs.conversation import (
    ChatState,
    Conversation,
    Message,
    TextFile,
    undo_last,
)
from gptq_loader_extensions.gradio.tabs.chat_updates import (
    ReplyRequest,
    Updates,
    render,
    stream_updates,
)
from gptq_loader_extensions.gradio.tabs.commands import read_command
from gptq_loader_extensions.gradio.tabs.export import read_conversation
from gptq_loader_extensions.gradio.tabs.header import header_html
from gptq_loader_extensions.gradio.tabs.message_view import files_html
from gptq_loader_extensions.gradio.tabs.saved_chats import (
    StoredConversation,
    new_key,
    read_stored,
)
from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_extensions.gradio.tabs.commands import Command
    from gptq_loader_extensions.gradio.tabs.settings_panel import SettingsPanel

__all__ = ["ChatEvents"]

ComponentUpdates = dict[Any, Any]  # the components that change, each with its new value
Files = tuple[TextFile, ...]

LEFT = "The page was left while this reply was written: Continue goes on, Retry begins anew."
UNANSWERED = "The page was left before there was a reply: Retry answers now."


class ChatEvents:
    """What happens in the tab.

    Args:
        models: generates the replies.
        parts: the tab's components by name; `header` is the page's.
        panel: the settings beside every tab, which belong to the conversation.
    """

    def __init__(self, models: Models, parts: Mapping[str, Any], panel: SettingsPanel) -> None:
        self._models = models
        self._parts = parts
        self._panel = panel

    def send(
        self,
        text: str,
        messages: Conversation,
        key: str,
        files: Files,
        *values: Any,  # noqa: ANN401
    ) -> Iterator[ComponentUpdates]:
        """Ask a question."""
        if not text.strip() and not files:
            yield self._by_component(render(ChatState(messages), key=key))
            return
        question = Message(role="user", content=text, files=files)
        request = ReplyRequest(
            (*messages, question), before=messages, key=key or new_key(), draft=text
        )
        yield from self._stream(request, values, files)

    def retry(
        self,
        messages: Conversation,
        key: str,
        *values: Any,  # noqa: ANN401
    ) -> Iterator[ComponentUpdates]:
        """Answer the last question again; the reply that is there stays as another version."""
        last = messages[-1] if messages else None
        replied = last is not None and last.role == "assistant"
        turns = messages[:-1] if replied else messages
        if not turns:
            yield self._nothing()
            return
        earlier = last if replied else None
        request = ReplyRequest(turns, before=messages, key=key, earlier=earlier)
        yield from self._stream(request, values)

    def go_on(
        self,
        messages: Conversation,
        key: str,
        *values: Any,  # noqa: ANN401
    ) -> Iterator[ComponentUpdates]:
        """Go on with the last reply, from where it ended."""
        if not messages or messages[-1].role != "assistant":
            yield self._nothing()
            return
        request = ReplyRequest(
            messages[:-1], before=messages, key=key, earlier=messages[-1], continues=True
        )
        yield from self._stream(request, values)

    def generate(
        self,
        text: str,
        messages: Conversation,
        key: str,
        *values: Any,  # noqa: ANN401
    ) -> Iterator[ComponentUpdates]:
        """Answer a question that was edited; what came after it goes."""
        command = read_command(text)
        if command.do != "edit" or not 0 <= command.at < len(messages):
            yield self._nothing()
            return
        question = messages[command.at].model_copy(update={"content": command.text})
        turns = (*messages[: command.at], question)
        request = ReplyRequest(turns, before=messages, key=key)
        yield from self._stream(request, values)

    def change(self, text: str, messages: Conversation, key: str, files: Files) -> ComponentUpdates:
        """Do at once what a script asks for."""
        command = read_command(text)
        match command.do:
            case "new":
                updates = self.empty()
            case "open":
                updates = self._show(command.stored or StoredConversation())
            case "import":
                updates = self._import(command.text)
            case "attach":
                updates = self._attach((*files, *map(self._counted, command.files)))
            case "detach":
                updates = self._attach((*files[: command.at], *files[command.at + 1 :]))
            case "version" | "edit" if 0 <= command.at < len(messages):
                message = _changed(messages[command.at], command)
                now = (*messages[: command.at], message, *messages[command.at + 1 :])
                updates = self._by_component(render(ChatState(now), key=key))
            case _:
                updates = self._nothing()
        return updates

    def undo(self, messages: Conversation, key: str) -> ComponentUpdates:
        """Move the last question back into the message box, and remove its reply."""
        earlier, question = undo_last(messages)
        draft = "" if question is None else question.content
        files = () if question is None else question.files
        updates = render(ChatState(earlier, draft=draft), key=key)
        return {**self._by_component(updates), **self._attach(files)}

    def empty(self) -> ComponentUpdates:
        """Begin a new conversation."""
        return {**self._by_component(render(ChatState())), **self._attach(())}

    def opened(self, text: str) -> ComponentUpdates:
        """Show what the browser has stored, to a page that opens."""
        return self._show(read_stored(text))

    def _show(self, stored: StoredConversation) -> ComponentUpdates:
        """Show a conversation that the browser has stored."""
        chat = stored.opened
        messages, key = (chat.messages, chat.key) if chat else ((), "")
        last = messages[-1] if messages else None
        status = LEFT if last is not None and last.ended == "left" else ""
        if last is not None and last.role == "user":
            status = UNANSWERED
        updates = render(ChatState(messages, status), key=key)
        return {**self._by_component(updates), **self._panel.restore(stored.panel)}

    def _import(self, text: str) -> ComponentUpdates:
        try:
            messages, system = read_conversation(text)
        except GPTQLoaderError as error:
            return {self._parts["problem"]: format_error(error)}
        updates = self._by_component(render(ChatState(messages), key=new_key()))
        if system:
            updates |= self._panel.restore_system(system)
        return updates

    def _counted(self, file: TextFile) -> TextFile:
        loaded = self._models.loaded
        if loaded is None:
            return file
        tokens = len(loaded.model.tokenizer(file.text)["input_ids"])
        return file.model_copy(update={"tokens": tokens})

    def _attach(self, files: Files) -> ComponentUpdates:
        loaded = self._models.loaded
        room = loaded.model.context if loaded else None
        return {
            self._parts["files"]: files,
            self._parts["attached"]: files_html(files, room=room),
        }

    def _stream(
        self, request: ReplyRequest, values: Sequence[Any], files: Files = ()
    ) -> Iterator[ComponentUpdates]:
        for i, updates in enumerate(stream_updates(self._models, request, values)):
            more: ComponentUpdates = {}
            if i == 0 and request.draft is not None:
                more = self._attach(())
            if updates["problem"] and files:
                more = self._attach(files)
            if i == 1:  # another browser may have changed the model since this page was drawn
                more[self._parts["header"]] = header_html(self._models.loaded)
            yield self._by_component(updates) | more

    def _nothing(self) -> ComponentUpdates:
        """Return no change; gradio takes an empty dictionary for a value."""
        return {self._parts["problem"]: ""}

    def _by_component(self, updates: Updates) -> ComponentUpdates:
        return {self._parts[name]: value for name, value in updates.items()}


def _changed(message: Message, command: Command) -> Message:
    """Return a message that shows another version, or says something else."""
    if command.do == "version":
        return message.show(command.shown)
    return message.change(message.version().model_copy(update={"content": command.text}))
