"""Wrap the product as an operator of torch, which torch.compile can trace; imports vLLM."""
# Without annotations from __future__: torch reads the operator's schema from the types.

from typing import Any

import torch
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name

__all__ = ["LayerNameType", "layer_argument", "multiply_layer"]


def layer_argument(name: str) -> LayerNameType:
    """Return a layer's name as compiled code passes it: as an input, and not as a constant.

    So layers that are alike are one graph, which vLLM compiles once and not once a layer.
    """
    return _encode_layer_name(name)


@torch.library.custom_op("gptq_loader::multiply_layer", mutates_args=())
def multiply_layer(x: torch.Tensor, layer: LayerNameType, out_features: int) -> torch.Tensor:
    """Multiply x [..., K] by the layer of that name in the running model: y [..., out_features].

    The layer is looked up where vLLM's own operators look theirs up.
    """
    del out_features
    method: Any = get_forward_context().no_compile_layers[_resolve_layer_name(layer)]
    y: torch.Tensor = method.multiply(x)
    return y


@multiply_layer.register_fake
def _shape_of(x: torch.Tensor, layer: LayerNameType, out_features: int) -> torch.Tensor:
    del layer
    return x.new_empty(*x.shape[:-1], out_features)
