"""Write single tokens as text and as bytes, for lists of probabilities."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenWords"]

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # what SentencePiece writes for a space


class TokenWords:
    """A tokenizer's single tokens, spaces and half characters included.

    Args:
        tokenizer: the checkpoint's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._added = {index: it.content for index, it in tokenizer.added_tokens_decoder.items()}
        self._bytes = {letter: bytes([it]) for it, letter in bytes_to_unicode().items()}
        self._by_bytes = any("\u0120" in token for token in tokenizer.get_vocab())

    def bytes(self, token: int) -> bytes:
        """Give the bytes that a token stands for."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if self._by_bytes:
            return b"".join(self._bytes.get(it, it.encode()) for it in piece)
        if match := BYTE.fullmatch(piece):
            return bytes.fromhex(match[1])
        return piece.replace(SPACE, " ").encode()

    def text(self, token: int) -> str:
        """Give a token's text; half characters are shown as such."""
        return self.bytes(token).decode(errors="replace")

    def name(self, token: int) -> str:
        """Give what tells a token from others: its text, or as OpenAI does the bytes of a half."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{it:02x}" for it in raw)
