"""Write single tokens as text and as bytes, for lists of log-probabilities."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenText"]

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
SPACE = "\u2581"  # what SentencePiece writes for a space


class TokenText:
    """A tokenizer's single tokens, spaces and half characters included.

    Args:
        tokenizer: the checkpoint's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._added = {
            index: token.content for index, token in tokenizer.added_tokens_decoder.items()
        }
        self._bytes = {letter: bytes([byte]) for byte, letter in bytes_to_unicode().items()}
        self._byte_level = any("\u0120" in token for token in tokenizer.get_vocab())

    def bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""
        if self._byte_level:
            return b"".join(self._bytes.get(letter, letter.encode()) for letter in piece)
        if match := BYTE.fullmatch(piece):
            return bytes.fromhex(match[1])
        return piece.replace(SPACE, " ").encode()

    def text(self, token: int) -> str:
        """Return a token's text, with a replacement character for half a one."""
        return self.bytes(token).decode(errors="replace")

    def name(self, token: int) -> str:
        """Return a token's text or, for half a character, its bytes as OpenAI writes them."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
