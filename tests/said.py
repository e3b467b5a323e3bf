"""Have a model say what a test chooses: its steps and its sampling are as ever."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Said"]


class Said:
    """Make the tokens of a text, and then the end, the likeliest ones.

    Args:
        tokenizer: the model's.
        text: what it is to say.
        begin: where the reply begins in the sequence.
    """

    def __init__(self, tokenizer: Any, text: str, begin: int) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        self._ids, self._begin = [*ids, tokenizer.eos_token_id], begin

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - self._begin
        scores = scores.clone()
        scores[0, self._ids[min(at, len(self._ids) - 1)]] = 1e4
        return scores
