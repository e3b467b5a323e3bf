"""Change logits as clients request: penalties for repetition, and a bias for single tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

__all__ = ["EndBan", "LogitBias", "PresencePenalty", "RecentPenalty", "read_bias"]


class PresencePenalty:
    """Make tokens less likely that the reply contains already: OpenAI's two penalties.

    Args:
        begin: where the reply begins in the sequence.
        presence: subtracted once from a token that occurs.
        frequency: subtracted for each time that it occurs.
    """

    def __init__(self, begin: int, *, presence: float, frequency: float) -> None:
        self._begin = begin
        self._presence = presence
        self._frequency = frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits [1, vocabulary] after the penalties."""
        tokens, counts = input_ids[0, self._begin :].unique(return_counts=True)
        if not len(tokens):
            return scores
        scores = scores.clone()
        scores[0, tokens] -= self._presence + self._frequency * counts.to(scores.dtype)
        return scores


class RecentPenalty:
    """Make tokens less likely that are among the last ones, the prompt's included.

    Args:
        penalty: as transformers' repetition penalty: logits are divided by it, or multiplied where
            they are negative.
        length: how many of the last tokens count.
    """

    def __init__(self, penalty: float, length: int) -> None:
        self._penalty = penalty
        self._length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits [1, vocabulary] after the penalty."""
        import torch

        recent = input_ids[0, -self._length :].unique()
        scores = scores.clone()
        before = scores[0, recent]
        scores[0, recent] = torch.where(before < 0, before * self._penalty, before / self._penalty)
        return scores


class EndBan:
    """Keep a reply from ending: for so many tokens, or as long as there is anything else to write.

    Args:
        begin: where the reply begins in the sequence.
        end_ids: the tokens that end it.
        tokens: how many there are to be at least; None for as many as it may have.
    """

    def __init__(self, begin: int, end_ids: Sequence[int], *, tokens: int | None) -> None:
        self._begin = begin
        self._end_ids = list(end_ids)
        self._tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits [1, vocabulary] without those of the end."""
        if self._tokens is not None and input_ids.shape[1] - self._begin >= self._tokens:
            return scores
        banned = scores.clone()
        banned[0, self._end_ids] = float("-inf")
        return banned if bool(banned.isfinite().any()) else scores  # a form may be complete


class LogitBias:
    """Add to the logits of single tokens.

    Args:
        bias: what to add, by token.
    """

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._tokens = list(bias)
        self._values = list(bias.values())

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits [1, vocabulary] with the bias."""
        del input_ids
        scores = scores.clone()
        scores[0, self._tokens] += scores.new_tensor(self._values)
        return scores


def read_bias(bias: Mapping[str, Any], vocabulary: int) -> dict[int, float]:
    """Read OpenAI's `logit_bias`: token ids as texts, each with a number.

    Raises:
        ApiError: a key is no token of the vocabulary.
    """
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < vocabulary):
            raise invalid(
                f"logit_bias: {key[:50]!r} is no token of this model, which has {vocabulary:,}",
                param="logit_bias",
            )
    return {int(key): float(value) for key, value in bias.items()}
