"""Take down each token as it is picked, with its probability and those of its rivals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["Scores", "Step", "score"]


@dataclass(frozen=True, slots=True)
class Step:
    """A token, and how likely the model found it.

    Attributes:
        token: its id.
        logprob: the natural logarithm of its probability, before any sampling option; None where
            nothing came before it.
        top: the likeliest tokens of that place, with theirs.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


class Scores:
    """Watch a reply being generated.

    Args:
        top: how many of the likeliest tokens to take down.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._steps: list[Step] = []

    def watch(self, token: int, logits: torch.Tensor) -> None:
        """Take down a token that was picked by these logits [1, vocabulary]."""
        self._steps.append(score(logits, [token], self._top)[0])

    def taken(self) -> Sequence[Step]:
        """Give what was taken down since the last call."""
        steps, self._steps = self._steps, []
        return steps


def score(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[Step]:
    """Score tokens [n] by the logits [n, vocabulary] of their places."""
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(top, dim=-1) if top else None
    steps = []
    for i, token in enumerate(tokens):
        rivals: tuple[tuple[int, float], ...] = ()
        if best is not None:
            values, ids = best.values[i].tolist(), best.indices[i].tolist()
            rivals = tuple(zip(ids, values, strict=True))
        steps.append(Step(token, float(logprobs[i, token]), rivals))
    return steps
