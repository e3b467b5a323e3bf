"""Wrap the product as an operator of torch, which torch.compile can trace; imports vLLM."""

from __future__ import annotations

from typing import Any

import torch
from vllm.forward_context import get_forward_context

__all__ = ["multiply_layer"]


@torch.library.custom_op("gptq_loader::multiply_layer", mutates_args=())
def multiply_layer(x: torch.Tensor, layer: str, out_features: int) -> torch.Tensor:
    """Multiply x [..., K] by the layer of that name in the running model: y [..., out_features].

    The layer is looked up where vLLM's own operators look theirs up.
    """
    del out_features
    method: Any = get_forward_context().no_compile_layers[layer]
    y: torch.Tensor = method.multiply(x)
    return y


@multiply_layer.register_fake
def _shape_of(x: torch.Tensor, layer: str, out_features: int) -> torch.Tensor:
    del layer
    return x.new_empty(*x.shape[:-1], out_features)
