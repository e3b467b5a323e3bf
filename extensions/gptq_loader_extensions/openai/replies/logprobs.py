"""Report the log-probabilities of a reply's tokens, in both of OpenAI's shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gptq_loader_extensions.openai.replies.engine import ReplyChunk
    from gptq_loader_extensions.openai.replies.scores import ScoredToken
    from gptq_loader_extensions.openai.replies.token_text import TokenText

__all__ = ["LogprobAligner", "chat_logprobs", "completion_logprobs"]

MIN_LOGPROB = -9999.0  # what stands for minus infinity, which JSON cannot write


class LogprobAligner:
    """Report a reply's tokens with the text they are of: some is held back, and ends have none.

    Args:
        token_text: writes tokens as bytes.
        end_ids: the tokens that end a reply.
    """

    def __init__(self, token_text: TokenText, end_ids: frozenset[int]) -> None:
        self._token_text = token_text
        self._end_ids = end_ids
        self._held: list[ScoredToken] = []
        self._sent_bytes = 0  # of text
        self._held_begin = 0  # where the first held token's text begins

    def add(self, chunk: ReplyChunk) -> list[ScoredToken]:
        """Add a chunk; return the tokens whose text has begun to be sent."""
        self._held += chunk.tokens
        self._sent_bytes += len(chunk.piece.text.encode())
        sent = []
        while self._held and self._held_begin < self._sent_bytes:
            token = self._held.pop(0)
            self._held_begin += len(self._token_text.bytes(token.token))
            sent.append(token)
        if chunk.piece.finish is None:
            return sent
        at_end = bool(self._held) and self._held[-1].token in self._end_ids
        if at_end:
            sent += self._held[:-1]
        elif chunk.piece.finish != "stop":  # else they spelled a stop text
            sent += self._held
        self._held = []
        return sent


def chat_logprobs(token_text: TokenText, tokens: Iterable[ScoredToken]) -> dict[str, Any]:
    """Return tokens' log-probabilities as /v1/chat/completions writes them."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = token_text.bytes(token)
        return {
            "token": raw.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(raw),
        }

    return {
        "content": [
            {
                **entry(scored.token, scored.logprob),
                "top_logprobs": [entry(*alternative) for alternative in scored.top],
            }
            for scored in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(
    token_text: TokenText, tokens: Sequence[ScoredToken], *, begin: int, top: int
) -> dict[str, Any]:
    """Return tokens' log-probabilities as /v1/completions writes them.

    Args:
        token_text: writes single tokens.
        tokens: what to report.
        begin: where their text begins.
        top: how many alternatives of each are requested.
    """
    offsets = []
    for scored in tokens:
        offsets.append(begin)
        begin += len(token_text.text(scored.token))
    alternatives = [
        {token_text.name(token): _finite(logprob) for token, logprob in _with_sampled(scored)}
        if scored.top
        else None
        for scored in tokens
    ]
    return {
        "tokens": [token_text.name(scored.token) for scored in tokens],
        "token_logprobs": [
            None if scored.logprob is None else _finite(scored.logprob) for scored in tokens
        ],
        "top_logprobs": alternatives if top else None,
        "text_offset": offsets,
    }


def _with_sampled(scored: ScoredToken) -> list[tuple[int, float | None]]:
    """List the alternatives of a token, and the token itself where it is none of them."""
    own = [] if any(token == scored.token for token, _ in scored.top) else [scored]
    return [*scored.top, *((it.token, it.logprob) for it in own)]


def _finite(logprob: float | None) -> float:
    return MIN_LOGPROB if logprob is None else max(logprob, MIN_LOGPROB)
