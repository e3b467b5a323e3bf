"""Gradients through layers whose products torch does not see; the weight itself has none.

A layer's forward is its own. Backward multiplies by the dequantised weight, a part of it at a
time, so that training an adapter needs no more memory than answering does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["by_identity", "needs_gradient", "with_gradient"]

IDENTITY_ROWS = 1024  # of the weight's columns found at a time

InputGradient = Any  # Callable[[Any, torch.Tensor], torch.Tensor]; mypy sees through no apply()


def needs_gradient(x: torch.Tensor) -> bool:
    """Say whether a product of `x` is one that torch must be able to go back through."""
    return x.requires_grad and torch.is_grad_enabled()


def with_gradient(
    module: Any,  # noqa: ANN401 - a prepared layer of ours
    x: torch.Tensor,
    input_gradient: Callable[[Any, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Multiply as `module.forward` does, and keep what goes back to `x`.

    Args:
        module: the layer.
        x: [..., in_features].
        input_gradient: finds x's gradient, float32 [M, in_features], from y's [M, out_features].

    Returns:
        [..., out_features].
    """
    y: torch.Tensor = _Product.apply(x, module, input_gradient)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context
        x: torch.Tensor,
        module: Any,  # noqa: ANN401
        input_gradient: InputGradient,
    ) -> torch.Tensor:
        ctx.module, ctx.input_gradient, ctx.like = module, input_gradient, (x.shape, x.dtype)
        y: torch.Tensor = module.forward(x)  # gradients are off here, so this is the plain product
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any,  # noqa: ANN401 - torch's context
        *gradients: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, None, None]:
        gradient: torch.Tensor = gradients[0]
        shape, dtype = ctx.like
        rows = gradient.reshape(-1, gradient.shape[-1]).float()
        back: torch.Tensor = ctx.input_gradient(ctx.module, rows)
        return back.view(shape).to(dtype), None, None


def by_identity(module: Any, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - any layer
    """Multiply by the weight that the layer's own product gives away: rounded as it rounds.

    The layer must look its bias up wherever it multiplies.
    """
    bare = _without_bias(module)
    parts = []
    for first in range(0, module.in_features, IDENTITY_ROWS):
        count = min(IDENTITY_ROWS, module.in_features - first)
        one = gradient.new_zeros(count, module.in_features)
        one[:, first:].fill_diagonal_(1)
        parts.append(gradient @ bare.forward(one).float().t())
    return torch.cat(parts, dim=1)


def _without_bias(module: Any) -> Any:  # noqa: ANN401
    """Give the layer with the same tensors and no bias: added, it would round small weights away.

    It lasts no longer than a call, and is none of the layer's copies: some refuse to be copied.
    """
    if module.bias is None:
        return module
    bare = object.__new__(type(module))
    bare.__dict__.update(module.__dict__, _buffers={**module._buffers, "bias": None})  # noqa: SLF001
    return bare
