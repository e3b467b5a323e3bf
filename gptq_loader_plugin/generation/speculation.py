"""Guess tokens that are probably next, so that one step reads several and keeps those it picks.

A step of a few tokens reads each weight once, and takes little longer than a step of one. Guessed
tokens are read beside the last one; each is kept where it is what would have been picked anyway,
by the same logits and the same draw (arXiv:2211.17192, with a guess that is certain of itself).
So what is picked has the distribution that it has without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from gptq_loader_plugin.generation.cache_layers import GrowableLayer
from gptq_loader_plugin.generation.kv_cache import make_cache
from gptq_loader_plugin.generation.model_runner import ModelRunner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

__all__ = [
    "MAX_GUESSES",
    "NOTE",
    "Drafter",
    "ModelDrafter",
    "NgramDrafter",
    "Pace",
    "can_crop",
    "crop",
]

NOTE = "reads words that were written before beside the last one: the same tokens, in fewer steps"
# Guesses of a step. The native step of five tokens is that of one to the last bit.
MAX_GUESSES = 4
NGRAMS = 4, 3, 2  # tokens that are looked up, the longest first
PRIOR = 0.5  # of a guess to be right, before any was made
WEIGHT = 0.1  # of a new measurement in a running mean
STEP_COST = 0.15  # of one more token in a step, in steps, before any was measured
FADING = 0.003  # how fast bad guesses are forgotten while none are made


class Drafter(Protocol):
    """Guesses how a sequence goes on."""

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Guess up to `count` tokens that follow `tokens`, which only grow from call to call."""
        ...


class NgramDrafter:
    """Guess that what followed the last few tokens before follows them again (prompt lookup)."""

    def __init__(self) -> None:
        self._following: dict[tuple[int, ...], int] = {}  # by tokens, the place after them
        self._known = 0  # tokens that were looked at

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Guess what followed the same tokens last."""
        for end in range(self._known, len(tokens)):
            for size in NGRAMS:
                if size <= end:
                    self._following[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
        for size in NGRAMS:
            place = self._following.get(tuple(tokens[-size:]))
            if place is not None:
                return list(tokens[place : place + count])
        return []


class ModelDrafter:
    """Guess what a smaller model would write, with the same tokens.

    Args:
        model: a causal language model whose cache can be cut short.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._runner = ModelRunner(model)
        self._cache: Any = make_cache(model)
        self._read: list[int] = []

    @torch.inference_mode()
    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Guess the model's likeliest tokens."""
        same = next(
            (
                i
                for i, (one, other) in enumerate(zip(self._read, tokens, strict=False))
                if one != other
            ),
            min(len(self._read), len(tokens)),
        )
        same = min(same, len(tokens) - 1)
        crop(self._cache, same)
        self._read = list(tokens[:same])
        guesses: list[int] = []
        new = list(tokens[same:])
        while len(guesses) < count:
            logits, self._cache = self._runner.run(
                new,
                self._cache,
                past=len(self._read),
                length=len(self._read) + len(new),
                logits_to_keep=1,
            )
            self._read += new
            new = [int(logits[0, -1].argmax())]
            guesses += new
        return guesses


class Pace:
    """How many guesses a step is worth, by what was measured: none, where they cost more time."""

    def __init__(self) -> None:
        self._right = PRIOR
        self._seconds: dict[int, float] = {}  # of a step, by its guesses; guessing included

    def choose(self) -> int:
        """Return the number of guesses by which most tokens a second are written."""
        best = max(
            range(MAX_GUESSES + 1), key=lambda count: self._tokens(count) / self._cost(count)
        )
        if best == 0:
            self._right += FADING * (PRIOR - self._right)
        return best

    def note(self, guesses: int, kept: int, seconds: float) -> None:
        """Take in a step: how many it guessed, how many of these were kept, and its time."""
        before = self._seconds.get(guesses, seconds)
        self._seconds[guesses] = before + WEIGHT * (min(seconds, 4 * before) - before)
        for which in range(min(kept + 1, guesses)):
            self._right += WEIGHT * (float(which < kept) - self._right)

    def _tokens(self, guesses: int) -> float:
        """Return how many tokens a step writes in the mean: those that are right, and one."""
        return sum(self._right**count for count in range(guesses + 1))

    def _cost(self, guesses: int) -> float:
        """Return the time of a step; where none was taken, after the nearest that was."""
        if guesses in self._seconds:
            return self._seconds[guesses]
        if not self._seconds:
            return 1 + STEP_COST * guesses
        near = min(self._seconds, key=lambda count: abs(count - guesses))
        return self._seconds[near] * (1 + STEP_COST * guesses) / (1 + STEP_COST * near)


def can_crop(cache: Any) -> bool:  # noqa: ANN401 - transformers' caches
    """Return whether a cache can forget its last positions."""
    layers: list[Any] = getattr(cache, "layers", [])
    return bool(layers) and all(isinstance(layer, GrowableLayer) for layer in layers)


def crop(cache: Any, length: int) -> None:  # noqa: ANN401
    """Forget all positions of a cache but the first ones; of none, nothing."""
    for layer in getattr(cache, "layers", ()):
        layer.crop(min(length - layer.length, 0))
