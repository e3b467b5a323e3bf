"""Pieces of a reply: with the thoughts apart, or a warning on the first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gptq_loader_plugin.chat.thinking import make_thought_parser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.chat.thinking import ThinkingMarks
    from gptq_loader_plugin.generation.generate import Piece

__all__ = ["separate_pieces", "with_warning"]


def separate_pieces(pieces: Iterator[Piece], marks: ThinkingMarks) -> Iterator[Piece]:
    """Yield a reply's pieces with their thoughts apart from their text."""
    parser = make_thought_parser(marks)
    for piece in pieces:
        thought, text = parser.feed(piece.text)
        if piece.finish is not None:
            rest = parser.finish()
            thought, text = thought + rest[0], text + rest[1]
        yield replace(piece, text=text, thought=thought)


def with_warning(pieces: Iterator[Piece], warning: str) -> Iterator[Piece]:
    """Yield a reply's pieces, the first with a warning."""
    for i, piece in enumerate(pieces):
        yield piece if i else replace(piece, warning=warning)
