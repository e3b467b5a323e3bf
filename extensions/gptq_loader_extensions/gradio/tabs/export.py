"""Write a conversation to take away: as JSON for programs, as Markdown for people."""

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
    """Write messages as the field `messages` of an OpenAI request, beside the model's name."""
    return json.dumps({"model": model, "messages": list(messages)}, indent=2, ensure_ascii=False)


def as_markdown(messages: Sequence[Message], *, model: str) -> str:
    """Write messages one under the other, each below a heading; contents are left as they are."""
    parts = [f"# Conversation with {model}" if model else "# Conversation"]
    parts += [f"## {HEADINGS[it['role']]}\n\n{it['content'].strip()}" for it in messages]
    return "\n\n".join(parts) + "\n"


def file_name(messages: Sequence[Message], suffix: str) -> str:
    """Name a file after the first question."""
    question = next((it["content"] for it in messages if it["role"] == "user"), "")
    words = re.findall(r"\w+", question.casefold())[:6]
    return f"{'-'.join(words)[:60] or 'conversation'}{suffix}"
