"""What the engine asks of a model, and how near its answers must come."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from gptq_loader_plugin.engine.attention import NotPaged

__all__ = ["plain_layers", "tolerance_of"]

# Of the probe's logits, as relative norms. The engine adds in another order than torch's attention.
# SmolLM2-135M's own in float16 and bfloat16 are 0.3 to 3 % and 0.3 to 5 % off float32's.
INT8_TOLERANCE = 5e-2  # more, where keys and values are rounded to 8 bits
TOLERANCE = {torch.float32: 1e-4, torch.float16: 6e-2, torch.bfloat16: 1e-1}


def plain_layers(model: Any) -> int:  # noqa: ANN401 - a transformers model
    """Count a model's layers, all of which keep keys and values and nothing else."""
    layers = DynamicCache(config=model.config).layers
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    for layer in layers:
        if type(layer) not in plain:
            raise NotPaged(f"it keeps a {type(layer).__name__}")
    return len(layers) or int(model.config.get_text_config().num_hidden_layers)


def tolerance_of(model: Any, *, int8: bool) -> float:  # noqa: ANN401
    """Return how far logits may lie apart: by the least precise dtype that a layer computes in."""
    dtypes: set[Any] = {getattr(module, "dtype", None) for module in model.modules()}
    own = max(TOLERANCE[it] for it in (dtypes | {model.dtype}) & TOLERANCE.keys())
    return own + INT8_TOLERANCE if int8 else own
