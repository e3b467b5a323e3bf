"""Record each token as it is sampled, with its log-probability and the most probable others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["LogprobRecorder", "ScoredToken", "score_tokens"]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token, and how likely the model found it.

    Attributes:
        token: its id.
        logprob: the natural logarithm of its probability, before any sampling option; None where
            nothing came before it.
        top: the most probable tokens at that position, each with its log-probability.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class LogprobRecorder:
    """Record the tokens of a reply while it is generated.

    Args:
        top: how many of the most probable tokens to record at each position.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._tokens: list[ScoredToken] = []

    def record(self, token: int, logits: torch.Tensor) -> None:
        """Record a token that was sampled from these logits [1, vocabulary]."""
        self._tokens += score_tokens(logits, [token], self._top)

    def flush(self) -> Sequence[ScoredToken]:
        """Return the tokens recorded since the last call."""
        tokens, self._tokens = self._tokens, []
        return tokens


def score_tokens(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[ScoredToken]:
    """Score tokens [n] by the logits [n, vocabulary] of their positions."""
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(top, dim=-1) if top else None
    scored = []
    for i, token in enumerate(tokens):
        alternatives: tuple[tuple[int, float], ...] = ()
        if best is not None:
            values, ids = best.values[i].tolist(), best.indices[i].tolist()
            alternatives = tuple(zip(ids, values, strict=True))
        scored.append(ScoredToken(token, float(logprobs[i, token]), alternatives))
    return scored
