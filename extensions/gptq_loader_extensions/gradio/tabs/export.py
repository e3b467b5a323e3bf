"""Export a conversation: as JSON for programs, as Markdown for people; and import one."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.gradio.jobs.conversation import Message, prompt_messages
from gptq_loader_extensions.gradio.tabs.message_view import thought_title
from gptq_loader_extensions.gradio.tabs.saved_chats import title_of
from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import date

    from gptq_loader_extensions.gradio.jobs.conversation import Conversation

__all__ = ["as_json", "as_markdown", "file_name", "read_conversation"]

HEADINGS = {"user": "You", "assistant": "Reply"}


def as_json(messages: Sequence[Message], *, model: str, system: str = "") -> str:
    """Write messages as the field `messages` of an OpenAI request, with the model's name."""
    listed = prompt_messages(messages, system)
    return json.dumps({"model": model, "messages": listed}, indent=2, ensure_ascii=False)


def as_markdown(messages: Sequence[Message], *, model: str, system: str = "") -> str:
    """Write messages one after the other, each below a heading; contents are left as they are."""
    parts = [f"# Conversation with {model}" if model else "# Conversation"]
    if system.strip():
        parts.append(f"## System\n\n{system.strip()}")
    for message in messages:
        parts.append(f"## {HEADINGS[message.role]}")
        if message.thought:
            title = thought_title(message)
            thought = message.thought.strip()
            parts.append(f"<details><summary>{title}</summary>\n\n{thought}\n\n</details>")
        parts.append(message.text().strip())
    return "\n\n".join(parts) + "\n"


def file_name(messages: Sequence[Message], suffix: str, *, on: date) -> str:
    """Name a file after the conversation's title and a date."""
    words = re.findall(r"\w+", title_of(messages).casefold())
    return f"{'-'.join(words)[:60] or 'conversation'}-{on.isoformat()}{suffix}"


def read_conversation(text: str) -> tuple[Conversation, str]:
    """Read a conversation from JSON, ours or any list of messages; return its system message too.

    Raises:
        OptionInvalid: it is none.
    """
    try:
        read = json.loads(text)
    except ValueError as error:
        raise _invalid(f"it is no JSON ({error})") from error
    listed = read.get("messages") if isinstance(read, dict) else read
    if not isinstance(listed, list) or not listed:
        raise _invalid("it has no list of messages")
    messages: list[Message] = []
    system = ""
    for i, entry in enumerate(listed):
        role = entry.get("role") if isinstance(entry, dict) else None
        content = _text(entry.get("content")) if isinstance(entry, dict) else None
        if content is None or role not in ("system", "developer", "user", "assistant"):
            raise _invalid(f"its message {i + 1} has no text, or a role that no chat has")
        if role in ("system", "developer"):
            system = f"{system}\n\n{content}".strip()
            continue
        thought = entry.get("reasoning_content")
        messages.append(
            Message(role=role, content=content, thought=thought if isinstance(thought, str) else "")
        )
    if not messages:
        raise _invalid("it has a system message alone")
    return tuple(messages), system


def _text(content: Any) -> str | None:  # noqa: ANN401 - whatever the file has
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    if not parts or not all(isinstance(text, str) for text in texts):
        return None
    return "\n".join(str(text) for text in texts)


def _invalid(why: str) -> OptionInvalid:
    return OptionInvalid(
        f"this file is no conversation: {why}",
        hint='choose a file that "Export as JSON" has written, or a list of role and content',
    )
