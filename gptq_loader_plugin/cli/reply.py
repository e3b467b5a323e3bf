"""Write a reply to stdout as it comes, its thoughts apart; make the system message of a chat."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gptq_loader_plugin.cli.output import plain, say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["ReplyWriter", "Thoughts", "system_message", "write_reply"]

Thoughts = Literal["show", "fold"]
DIM, NORMAL = "\x1b[2m", "\x1b[22m"


@dataclass(slots=True)
class ReplyWriter:
    """Write one reply as it comes: its text to stdout, its thoughts to stderr.

    Attributes:
        thoughts: whether these are shown, or their time alone.
        text: what was written to stdout.
        last: the last piece.
    """

    thoughts: Thoughts = "show"
    text: str = ""
    last: Piece | None = None
    _began: float | None = None  # of the thought that is being written
    _shown_seconds: int = -1

    def write(self, piece: Piece) -> None:
        """Write a piece."""
        self.last = piece
        if piece.warning:
            say(f"warning: {piece.warning}")
        if piece.thought:
            self._think(piece.thought)
        if piece.text:
            self.end_thought()
            self.text += piece.text
            sys.stdout.write(piece.text)
            sys.stdout.flush()

    def end_thought(self) -> None:
        """Say how long a thought took, where one is being written."""
        if self._began is None:
            return
        seconds, self._began = time.monotonic() - self._began, None
        before = "\r" if self.thoughts == "fold" and sys.stderr.isatty() else "\n"
        before = "" if self.thoughts == "fold" and not sys.stderr.isatty() else before
        _write_dim(f"{before}(thought for {seconds:.1f} s)\n")

    def _think(self, thought: str) -> None:
        if self._began is None:
            self._began, self._shown_seconds = time.monotonic(), -1
        if self.thoughts == "show":
            _write_dim(thought)
            return
        seconds = int(time.monotonic() - self._began)
        if seconds != self._shown_seconds and sys.stderr.isatty():
            self._shown_seconds = seconds
            _write_dim(f"\r(thinking, {seconds} s)")


def _write_dim(text: str) -> None:
    """Write to stderr, in faint letters where it is a terminal that has them."""
    is_plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ
    line_start = "\r" if text.startswith("\r") else ""
    text = plain(text.removeprefix("\r"))
    sys.stderr.write(line_start + (text if is_plain else f"{DIM}{text}{NORMAL}"))
    sys.stderr.flush()


def write_reply(model: LoadedModel, pieces: Iterator[Piece], thoughts: Thoughts = "show") -> None:
    """Write a reply to stdout as it comes, and what it took to stderr."""
    began = time.monotonic()
    writer = ReplyWriter(thoughts)
    for piece in pieces:
        writer.write(piece)
    writer.end_thought()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if writer.last is not None:
        tokens = writer.last.tokens
        rate = tokens / max(time.monotonic() - began, 1e-9)
        say(f"{tokens} tokens, {rate:.0f} a second; {model.plan.headline()}")


def system_message(model: LoadedModel, system: str | None) -> list[dict[str, str]]:
    """Make the system message: the user's, or with "card" the one the model card gives."""
    if system is None:
        return []
    if system != "card":
        return [{"role": "system", "content": system}]
    if model.card.system is None:
        from gptq_loader_plugin.errors import TemplateError

        raise TemplateError(
            "the model card gives no system message",
            hint="write one yourself: --system 'You are ...'",
        )
    return [{"role": "system", "content": model.card.system}]
