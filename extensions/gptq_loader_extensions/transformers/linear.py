"""Make a prepared layer an instance of torch's Linear, so that PEFT puts adapters on it.

PEFT recognises torch's Linear, and the linears of a few libraries, by type. A kernel's module
behaves as a linear and keeps its weight packed, so its class is widened: it is both. Its `weight`
has a shape, and is read from the checkpoint when its values are used.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PackedWeight", "present_as_linear"]


def present_as_linear(
    module: nn.Module,
    *,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    read_weight: Callable[[], torch.Tensor],
) -> None:
    """Widen the class of a prepared layer by torch's Linear.

    Args:
        module: the layer; it multiplies as before.
        shape: of its weight, (out_features, in_features).
        dtype: the model's.
        device: the one the layer was prepared for.
        read_weight: returns the dequantised weight.
    """
    if isinstance(module, nn.Linear):
        return
    module.out_features, module.in_features = shape  # type: ignore[assignment]  # torch's guess
    module.weight_info = WeightInfo(shape, dtype, device, read_weight)  # type: ignore[assignment]
    kind: Any = type(module)
    packed = not hasattr(module, "weight")  # a layer that was dequantised has its own
    module.__class__ = _widened(kind, packed=packed)


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """The weight of a prepared layer: its shape, dtype and device, and how to read its values."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    read_weight: Callable[[], torch.Tensor]


class PackedWeight(torch.Tensor):
    """A weight [out_features, in_features] without values: an operator that uses it reads them.

    Args:
        info: its shape, and how to read it.
    """

    info: WeightInfo

    @staticmethod
    def __new__(  # noqa: PYI034 - torch has it static
        cls: type[PackedWeight],
        info: WeightInfo,
    ) -> PackedWeight:
        """Return a tensor that takes no memory."""
        weight: PackedWeight = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, info.shape, dtype=info.dtype, device=info.device
        )
        weight.info = info
        return weight

    def __repr__(self) -> str:  # type: ignore[override]  # torch lets contents be passed
        return f"PackedWeight({list(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is a placeholder
        cls,
        func: Any,  # noqa: ANN401 - torch's own
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Call one of torch's operators with the values."""
        del types

        def read(value: Any) -> Any:  # noqa: ANN401
            if not isinstance(value, cls):
                return value
            return value.info.read_weight().to(value.device, value.dtype)

        return func(*tree_map(read, args), **tree_map(read, kwargs or {}))


@functools.cache
def _widened(kind: Any, *, packed: bool) -> Any:  # noqa: ANN401 - classes of modules
    bases = (_PackedLinear if packed else _PreparedLinear, kind, nn.Linear)
    return type(kind.__name__, bases, {"__doc__": kind.__doc__, "kind": kind, "packed": packed})


class _PreparedLinear(nn.Module):
    """What a widened class adds to the kernel's own."""

    kind: type[nn.Module]
    packed: bool
    weight_info: WeightInfo

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:  # noqa: ANN401, FBT001, FBT002 - torch's own
        device = self.weight_info.device
        target = fn(torch.empty(0, device=device)).device
        if target.type not in (device.type, "meta"):
            raise OptionInvalid(
                f"this model was prepared for {device.type}, and cannot be moved to {target.type}",
                hint=f'load it there: from_pretrained(..., device_map="{target.type}")',
            )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 - pickle's own
        return _empty_layer, (self.kind, self.packed), self.__getstate__()  # type: ignore[no-untyped-call]


class _PackedLinear(_PreparedLinear):
    @property
    def weight(self) -> torch.Tensor:
        """The weight, which is not read until its values are used."""
        return PackedWeight(self.weight_info)


def _empty_layer(kind: Any, packed: bool) -> nn.Module:  # noqa: ANN401, FBT001 - as pickle passes it
    """Return an empty layer for pickle or copy, which restore its state."""
    widened = _widened(kind, packed=packed)
    layer: nn.Module = widened.__new__(widened)
    return layer
