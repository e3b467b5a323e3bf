"""Which modules of a model are linear layers, and their shapes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["is_transposed", "linear_shape", "plain_linear"]


def linear_shape(module: torch.nn.Module) -> tuple[int, int] | None:
    """Return (in_features, out_features) of a linear module; GPT-2's Conv1D is one, transposed.

    A router may be an `nn.Linear` that computes something else by a `forward` of its own.
    """
    from torch import nn

    if isinstance(module, nn.Linear) and _multiplies(module):
        return module.in_features, module.out_features
    if is_transposed(module):
        weight: Any = module.weight
        rows, columns = weight.shape
        return int(rows), int(columns)
    return None


def is_transposed(module: torch.nn.Module) -> bool:
    """Whether a linear module keeps its weight as [K, N], as GPT-2's Conv1D does."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _multiplies(module: torch.nn.Linear) -> bool:
    """Return whether a linear module returns one product, as `nn.Linear` itself does.

    Where its class has a `forward` of its own, that is tried on tensors without values.
    """
    import torch
    from torch import nn

    if type(module).forward is nn.Linear.forward:
        return True
    rows = torch.empty(1, module.in_features, device="meta", dtype=module.weight.dtype)
    stand_in = copy.copy(module)  # without values; and no hook of the module sees the call
    stand_in.__dict__["_parameters"] = {
        name: None if value is None else nn.Parameter(value.to("meta"), requires_grad=False)
        for name, value in module._parameters.items()  # noqa: SLF001 - the absent bias too
    }
    try:
        product = type(module).forward(stand_in, rows)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return isinstance(product, torch.Tensor) and product.shape == (1, module.out_features)


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    """Make a linear of a weight [out_features, in_features]."""
    from torch import nn

    module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module
