"""Make a prepared layer an instance of torch's Linear, so that PEFT puts adapters on it.

PEFT takes torch's Linear and what a few libraries bring, by type. A kernel's module is a linear to
its caller and keeps its weight packed, so its class is widened: it stays what it was as well.
"""

from __future__ import annotations

import functools
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["present_as_linear"]


def present_as_linear(module: nn.Module, layer: LayerSpec) -> None:
    """Widen the class of a prepared layer by torch's Linear.

    Args:
        module: the layer; it multiplies as before.
        layer: its shape.
    """
    if isinstance(module, nn.Linear):
        return
    module.in_features, module.out_features = layer.in_features, layer.out_features
    module.__class__ = _widened(type(module))


@functools.cache
def _widened(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Prepared, kind, nn.Linear), {"__doc__": kind.__doc__})


class _Prepared(nn.Module):
    """What a widened class has beside the kernel's own."""

    @property
    def qweight(self) -> torch.Tensor | None:
        """A tensor of the layer's, for PEFT, which asks it for the device."""
        return next(chain(self.parameters(), self.buffers()), None)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:  # noqa: ANN401, FBT001, FBT002 - torch's own
        here = self.qweight
        if here is not None and not here.is_meta:
            there = fn(torch.empty(0, device=here.device)).device.type
            if there not in (here.device.type, "meta"):
                raise OptionInvalid(
                    f"this model was prepared for {here.device.type}, and cannot be moved to "
                    f"{there} any more",
                    hint=f'load it there: from_pretrained(..., device_map="{there}")',
                )
        return super()._apply(fn, recurse)

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 - pickle's own
        kind = type(self).__mro__[2]
        return _restored, (kind,), self.__getstate__()


def _restored(kind: type[nn.Module]) -> nn.Module:
    """Make an empty layer for pickle or copy, which give it its state."""
    made = _widened(kind)
    return made.__new__(made)
