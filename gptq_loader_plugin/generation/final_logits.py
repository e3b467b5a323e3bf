"""A model's logits from its decoder's states, as its own forward has them."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["final_logits"]


def final_logits(model: Any, states: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - a transformers model
    """Return the head's logits of some states, capped or scaled where the model does that."""
    logits: torch.Tensor = model.get_output_embeddings()(states)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap is not None:  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    scale = getattr(model, "logit_scale", None)
    if scale is not None:  # Cohere
        logits = logits * scale
    divisor = getattr(model.config, "logits_scaling", None)
    return logits if divisor is None else logits / divisor  # Granite
