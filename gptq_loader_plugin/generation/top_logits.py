"""The logits that picking a token needs: all, or where that is enough, the top ones alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from gptq_loader_plugin.kernel import TopLogitsHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

__all__ = ["compute_logits", "top_logits_head"]


class Picks(Protocol):
    """A reply, as far as its next token is picked by logits."""

    def needed_logits(self) -> int:
        """Return how many of the top logits it needs; 0 where it needs all of them."""
        ...

    def excluded(self, vocabulary: int) -> torch.Tensor | None:
        """Mark the tokens that do not count among those needed: bool [vocabulary]."""
        ...


def top_logits_head(model: PreTrainedModel) -> TopLogitsHead | None:
    """Find a head that can return its top logits alone, of a model that nobody watches."""
    head: object = model.get_output_embeddings()
    return head if isinstance(head, TopLogitsHead) and not _is_watched(model) else None


def compute_logits(
    head: TopLogitsHead, generations: Sequence[Picks], states: torch.Tensor
) -> torch.Tensor:
    """Return the logits that some generations need [generations, vocabulary], from their states.

    All of them, or where no generation needs all, the top ones alone.
    """
    needed = [generation.needed_logits() for generation in generations]
    if all(needed):
        marks = [generation.excluded(head.out_features) for generation in generations]
        excluded = None
        if any(mark is not None for mark in marks):
            none = torch.zeros(head.out_features, dtype=torch.bool, device=states.device)
            excluded = torch.stack([none if mark is None else mark for mark in marks])
        logits = head.top_logits(states, needed, excluded)
        if logits is not None:
            return logits
    return head(states)


def _is_watched(model: Any) -> bool:  # noqa: ANN401 - a transformers model
    """Return whether something wants to see what goes into a model, or comes out of it."""
    hooks = model._forward_hooks or model._forward_pre_hooks  # noqa: SLF001 - torch has no other way to tell
    return bool(hooks) or "forward" in model.__dict__
