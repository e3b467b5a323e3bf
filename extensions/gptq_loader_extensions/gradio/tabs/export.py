"""Export a conversation: as JSON for programs, as Markdown for people."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_extensions.gradio.jobs.conversation import Message

__all__ = ["as_json", "as_markdown", "file_name"]

HEADINGS = {"system": "System", "user": "You", "assistant": "Reply"}


def as_json(messages: Sequence[Message], *, model: str) -> str:
    """Write messages as the field `messages` of an OpenAI request, with the model's name."""
    return json.dumps({"model": model, "messages": list(messages)}, indent=2, ensure_ascii=False)


def as_markdown(messages: Sequence[Message], *, model: str) -> str:
    """Write messages one after the other, each below a heading; contents are left as they are."""
    parts = [f"# Conversation with {model}" if model else "# Conversation"]
    parts += [
        f"## {HEADINGS[message['role']]}\n\n{message['content'].strip()}" for message in messages
    ]
    return "\n\n".join(parts) + "\n"


def file_name(messages: Sequence[Message], suffix: str) -> str:
    """Name a file after the first question."""
    question = next((message["content"] for message in messages if message["role"] == "user"), "")
    words = re.findall(r"\w+", question.casefold())[:6]
    return f"{'-'.join(words)[:60] or 'conversation'}{suffix}"
