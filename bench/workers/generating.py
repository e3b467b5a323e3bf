"""Time transformers' `generate`, token by token."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from turns import DEPTH, token_ids

if TYPE_CHECKING:
    from transformers import GenerationMixin


class Clock:
    """A stopping criterion that never stops, and notes the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, ids: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        """Note the time; stop nothing."""
        self.times.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool)


def generate(model: GenerationMixin, prompt: int, tokens: int) -> list[float]:
    """Write a greedy reply; give when it began, and when each token was known."""
    ids = torch.tensor([token_ids(prompt)])
    clock = Clock()
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=[clock],
        )
    return [began, *clock.times]


def prompt_seconds(model: GenerationMixin, tokens: int) -> float:
    """Time a prompt, up to the token after it."""
    began, first = generate(model, tokens, 1)
    return first - began


def reply_seconds(model: GenerationMixin, tokens: int) -> float:
    """Time a reply after a prompt of DEPTH tokens, its first token left out."""
    times = generate(model, DEPTH, tokens + 1)
    return times[-1] - times[1]
