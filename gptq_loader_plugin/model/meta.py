"""Build a model's modules without memory for its weights, on the calling thread alone.

Other ways (accelerate's `init_empty_weights`, transformers' `no_init_weights`, torch's default
dtype) alter what every thread of the process sees, and a model that another thread loads meanwhile
would lose its weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MetaDevice", "empty_parameters"]

UNSET = (torch.empty,)  # what these make has no values to lose
WITHOUT_DTYPE = (
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.tensor,
    torch.linspace,
)  # fmt: skip
# Of weights that a model makes of zeros or at random: buffers that are computed are far smaller.
LARGE = 1 << 22


class MetaDevice(TorchFunctionMode):
    """While it is entered, tensors without values are on the meta device, and so are large ones.

    Args:
        dtype: what a tensor gets that is made without one.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401 - torch's signature
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call one of torch's functions."""
        del types
        kwargs = dict(kwargs or {})
        if func not in WITHOUT_DTYPE:
            return func(*args, **kwargs)
        if func in UNSET and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        made: torch.Tensor = func(*args, **kwargs)
        if not made.is_floating_point():
            return made
        if kwargs.get("dtype") is None:
            made = made.to(self.dtype)
        large = made.numel() >= LARGE and kwargs.get("device") is None
        return made.to("meta") if large and func is not torch.tensor else made


def empty_parameters(model: nn.Module) -> None:
    """Take away the values of all parameters; those that are one and the same stay so."""
    emptied: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.is_meta:
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"))
                setattr(module, name, emptied.setdefault(id(parameter), empty))
