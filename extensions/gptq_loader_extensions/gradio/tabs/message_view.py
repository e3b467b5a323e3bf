"""Write a message as the Markdown that the chat draws."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_extensions.gradio.jobs.conversation import Message, TextFile

__all__ = ["LATEX", "as_markdown", "files_html", "thought_title"]

# Fenced code, to the end while its end is not yet written, and code within a line.
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
TAG = re.compile(r"<(?=[A-Za-z/!?])")
# Names that models have for a block's language, and the page's own for them.
LANGUAGE = re.compile(
    r"^(\s*```)(c\+\+|cc|golang|py|rs|sh|shell|ts|yml)(?=\s*$)", re.MULTILINE | re.IGNORECASE
)
LANGUAGES = {
    "c++": "cpp",
    "cc": "cpp",
    "golang": "go",
    "py": "python",
    "rs": "rust",
    "sh": "bash",
    "shell": "bash",
    "ts": "typescript",
    "yml": "yaml",
}
MINUTE = 60
# As models write it; a single dollar is money.
LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": r"\[", "right": r"\]", "display": True},
    {"left": r"\(", "right": r"\)", "display": False},
]


def as_markdown(message: Message, *, running: bool = False) -> str:
    """Write a message: its files by name, its thought folded, and its text.

    Args:
        message: the message.
        running: whether it is still being written.
    """
    parts = [
        f"\N{PAPERCLIP} **{_escaped(file.name)}** ({file.tokens:,} tokens)"
        for file in message.files
    ]
    if message.thought:
        thinks = running and not message.content
        parts.append(_folded(message, is_open=thinks))
    if message.content:
        parts.append(_escaped(message.content))
    elif not running and not message.files and not message.thought:
        parts.append("*(a reply without text)*")
    return "\n\n".join(parts)


def thought_title(message: Message, *, running: bool = False) -> str:
    """Describe how long a model thought."""
    if running:
        return "Thinking …"
    if message.seconds is None:
        return "Thought"
    seconds = round(message.seconds)
    if seconds < 1:
        return "Thought for less than 1 s"
    minutes, rest = divmod(seconds, MINUTE)
    return f"Thought for {minutes} min {rest} s" if minutes else f"Thought for {seconds} s"


def files_html(files: Sequence[TextFile], *, room: int | None) -> str:
    """Draw the files that go with the next message, each with its tokens.

    Args:
        files: the files.
        room: how many tokens the model's context has, where one is loaded.
    """
    chips = "".join(
        f"<li>\N{PAPERCLIP} {escape(file.name)} <small>{file.tokens:,} tokens</small> "
        f"<button type='button' data-detach='{i}' aria-label='Remove {escape(file.name)}'>"
        "\N{MULTIPLICATION SIGN}</button></li>"
        for i, file in enumerate(files)
    )
    total = sum(file.tokens for file in files)
    if room is not None and total >= room:
        chips += f"<li role='alert'>{total:,} tokens do not fit the context of {room:,}</li>"
    return f"<ul>{chips}</ul>" if chips else ""


def _folded(message: Message, *, is_open: bool) -> str:
    thought = _escaped(message.thought)
    if thought.count("```") % 2:
        thought += "\n```"
    title = thought_title(message, running=is_open)
    return (
        f"<details{' open' if is_open else ''}><summary>{title}</summary>\n\n"
        f"{thought}\n\n</details>"
    )


def _escaped(text: str) -> str:
    """Keep what looks like a tag, outside code, from being taken for one and vanishing."""
    parts = CODE.split(text)  # every second part is code
    parts[::2] = [TAG.sub("&lt;", part.replace("&lt;", "&amp;lt;")) for part in parts[::2]]
    parts[1::2] = [LANGUAGE.sub(_language, part, count=1) for part in parts[1::2]]
    return "".join(parts)


def _language(fence: re.Match[str]) -> str:
    return fence[1] + LANGUAGES[fence[2].lower()]
