"""Make a prepared layer an instance of torch's Linear, so that PEFT puts adapters on it.

PEFT takes torch's Linear and what a few libraries bring, by type. A kernel's module is a linear to
its caller and keeps its weight packed, so its class is widened: it stays what it was as well. Its
`weight` knows its shape, and is read from the checkpoint where somebody wants its values.
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
        device: where the layer was prepared to be.
        read_weight: gives the dequantised weight.
    """
    if isinstance(module, nn.Linear):
        return
    module.out_features, module.in_features = shape  # type: ignore[assignment]  # torch's guess
    module.told = Told(shape, dtype, device, read_weight)  # type: ignore[assignment]
    kind: Any = type(module)
    packed = not hasattr(module, "weight")  # a layer that was dequantised has its own
    module.__class__ = _widened(kind, packed=packed)


@dataclass(frozen=True, slots=True)
class Told:
    """What a prepared layer is told of itself: its weight's shape and dtype, its device, values."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    read_weight: Callable[[], torch.Tensor]


class PackedWeight(torch.Tensor):
    """A weight [out_features, in_features] without values: what uses them reads them first.

    Args:
        told: what is known of it.
    """

    told: Told

    @staticmethod
    def __new__(  # noqa: PYI034 - torch has it static
        cls: type[PackedWeight],
        told: Told,
    ) -> PackedWeight:
        """Make a tensor that takes no memory."""
        made: PackedWeight = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls, told.shape, dtype=told.dtype, device=told.device
        )
        made.told = told
        return made

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

        def values(it: Any) -> Any:  # noqa: ANN401
            return it.told.read_weight().to(it.device, it.dtype) if isinstance(it, cls) else it

        return func(*tree_map(values, args), **tree_map(values, kwargs or {}))


@functools.cache
def _widened(kind: Any, *, packed: bool) -> Any:  # noqa: ANN401 - classes of modules
    bases = (_Packed if packed else _Prepared, kind, nn.Linear)
    return type(kind.__name__, bases, {"__doc__": kind.__doc__, "kind": kind, "packed": packed})


class _Prepared(nn.Module):
    """What a widened class has beside the kernel's own."""

    kind: type[nn.Module]
    packed: bool
    told: Told

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:  # noqa: ANN401, FBT001, FBT002 - torch's own
        here = self.told.device
        there = fn(torch.empty(0, device=here)).device
        if there.type not in (here.type, "meta"):
            raise OptionInvalid(
                f"this model was prepared for {here.type}, and cannot be moved to {there.type}",
                hint=f'load it there: from_pretrained(..., device_map="{there.type}")',
            )
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:  # noqa: ANN401 - pickle's own
        return _restored, (self.kind, self.packed), self.__getstate__()  # type: ignore[no-untyped-call]


class _Packed(_Prepared):
    @property
    def weight(self) -> torch.Tensor:
        """The weight, of which only the shape is known until its values are used."""
        return PackedWeight(self.told)


def _restored(kind: Any, packed: bool) -> nn.Module:  # noqa: ANN401, FBT001 - as pickle hands it
    """Make an empty layer for pickle or copy, which give it its state."""
    widened = _widened(kind, packed=packed)
    made: nn.Module = widened.__new__(widened)
    return made
