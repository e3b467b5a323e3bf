"""Tokens in, certain text out."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase


__all__ = []

UNFINISHED = "\ufffd"  # what a tokenizer gives for the first bytes of a character


class TextStream:
    """Tokens in, certain text out: no half characters, no beginnings of stop texts.

    Args:
        tokenizer: turns tokens into text.
        stop: texts that end the stream.
        silent_ids: tokens that are never shown.
        shown_ids: tokens that are, though the tokenizer calls them special.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        silent_ids: frozenset[int] = frozenset(),
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._silent = silent_ids
        self._shown = shown_ids
        self._tokens: list[int] = []
        self._begin = 0  # decoding starts here: a token's text depends on those before it
        self._decoded = 0  # tokens before this have had their text taken
        self._held = ""  # text that could still be the beginning of a stop text
        self.stopped = False
        self.stop_text = ""  # the one that ended it

    def add(self, token: int) -> str:
        """Take one token; return the text that is certain now."""
        if self.stopped or token in self._silent:
            return ""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._begin : self._decoded])
        now = self._decode(self._tokens[self._begin :])
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._begin, self._decoded = self._decoded, len(self._tokens)
        return self._pass(now[len(before) :])

    def rest(self) -> str:
        """Return what was held back, at the end of the stream; half characters are dropped."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._begin : self._decoded])
        now = self._decode(self._tokens[self._begin :]).rstrip(UNFINISHED)
        self._decoded = len(self._tokens)
        new = self._pass(now[len(before) :])
        held, self._held = self._held, ""
        return new + ("" if self.stopped else held)

    def _pass(self, text: str) -> str:
        text = self._held + text
        ends = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            end, self.stop_text = min(ends)
            return text[:end]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, tokens: list[int]) -> str:
        for i, token in enumerate(tokens):
            if token in self._shown:
                mark = str(self._tokenizer.convert_ids_to_tokens(token))
                return self._decode(tokens[:i]) + mark + self._decode(tokens[i + 1 :])
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text if isinstance(text, str) else "".join(text)


def _overlap(text: str, stop: str) -> int:
    """Count the last characters of `text` that begin `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
