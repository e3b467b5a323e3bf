"""Report the probabilities of a reply's tokens, in both of OpenAI's shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gptq_loader_extensions.openai.replies.engine import ReplyChunk
    from gptq_loader_extensions.openai.replies.scores import ScoredToken
    from gptq_loader_extensions.openai.replies.token_text import TokenWords

__all__ = ["Aligned", "chat_logprobs", "completion_logprobs"]

LEAST = -9999.0  # what stands for minus infinity, which JSON cannot write


class Aligned:
    """Give out a reply's tokens with the text they are of: some are held back, and ends are none.

    Args:
        words: writes tokens as bytes.
        ends: the tokens that end a reply.
    """

    def __init__(self, words: TokenWords, ends: frozenset[int]) -> None:
        self._words = words
        self._ends = ends
        self._held: list[ScoredToken] = []
        self._given = 0  # bytes of text
        self._begin = 0  # where the first held token begins

    def take(self, said: ReplyChunk) -> list[ScoredToken]:
        """Take a piece; give the tokens whose text has begun to be given out."""
        self._held += said.tokens
        self._given += len(said.piece.text.encode())
        given = []
        while self._held and self._begin < self._given:
            step = self._held.pop(0)
            self._begin += len(self._words.bytes(step.token))
            given.append(step)
        if said.piece.finish is None:
            return given
        at_end = bool(self._held) and self._held[-1].token in self._ends
        if at_end:
            given += self._held[:-1]
        elif said.piece.finish != "stop":  # else they spelled a stop text
            given += self._held
        self._held = []
        return given


def chat_logprobs(words: TokenWords, steps: Iterable[ScoredToken]) -> dict[str, Any]:
    """Write tokens' probabilities as /v1/chat/completions does."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = words.bytes(token)
        return {
            "token": raw.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(raw),
        }

    return {
        "content": [
            {**entry(it.token, it.logprob), "top_logprobs": [entry(*rival) for rival in it.top]}
            for it in steps
        ],
        "refusal": None,
    }


def completion_logprobs(
    words: TokenWords, steps: Sequence[ScoredToken], *, begin: int, top: int
) -> dict[str, Any]:
    """Write tokens' probabilities as /v1/completions does; `begin` is where the text begins."""
    offsets = []
    for it in steps:
        offsets.append(begin)
        begin += len(words.text(it.token))
    rivals = [
        {words.name(token): _finite(logprob) for token, logprob in it.top} if it.top else None
        for it in steps
    ]
    return {
        "tokens": [words.name(it.token) for it in steps],
        "token_logprobs": [None if it.logprob is None else _finite(it.logprob) for it in steps],
        "top_logprobs": rivals if top else None,
        "text_offset": offsets,
    }


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)
