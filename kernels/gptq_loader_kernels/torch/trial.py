"""Compile what unpacks weights, once for each kind of layer, and hold it to the plain operators."""

from __future__ import annotations

import logging
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_kernels.torch.unpack import unpack_weight

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_kernels.torch.linear import TorchLinear

__all__ = ["Trials"]

logger = logging.getLogger(__name__)


class Trials:
    """What came of compiling for one device.

    Each kind of layer is compiled when the first such layer is prepared, for any number of columns,
    so that no reply waits for a compiler and nothing is compiled while a CUDA graph is captured.

    Args:
        reason: why nothing is compiled there, or None.
    """

    def __init__(self, reason: str | None) -> None:
        self.reason = reason
        self._compiled: dict[tuple[Any, ...], Callable[..., torch.Tensor]] = {}

    def compile(self, module: TorchLinear) -> None:
        """Have a layer unpacked by compiled code, where that can be had and unpacks the same."""
        if self.reason is not None:
            return
        kind = _kind(module)
        if kind not in self._compiled:
            compiled = _compile()
            self.reason = _compare(compiled, module)
            if self.reason is not None:
                logger.info("weights are unpacked operator by operator: %s", self.reason)
                return
            self._compiled[kind] = compiled
        module.unpack_weight = self._compiled[kind]


def _kind(module: TorchLinear) -> tuple[Any, ...]:
    """Return what code is generated for: all sizes but the columns, which divisions stand on."""
    sizes = (module.in_features, module.scales.shape[1], tuple(module.zeros.shape) == (1, 1))
    dtypes = (module.dtype, module.scales_dtype)
    return (module.bits, *sizes, *dtypes, None if module.groups is None else len(module.groups))


def _compile() -> Callable[..., torch.Tensor]:
    """Compile, once it is called, by itself: torch keeps 8 versions at most of one code object."""
    code = unpack_weight.__code__.replace()
    function = FunctionType(code, unpack_weight.__globals__, unpack_weight.__name__)
    # Not fullgraph: where it would compile anew after all and cannot, it unpacks by operators.
    compiled: Callable[..., torch.Tensor] = torch.compile(function, options={"compile_threads": 1})
    return compiled


@torch.inference_mode()
def _compare(compiled: Callable[..., torch.Tensor], module: TorchLinear) -> str | None:
    """Unpack a layer's first part by compiled code: why that is not to be, or None."""
    for columns in (module.tile_columns, module.part_columns):
        arguments = module.unpack_arguments(0, min(columns, module.out_features), module.dtype)
        planes, scales, zeros, *_ = arguments
        for tensor in (*planes, scales, zeros):
            if len(tensor) > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)  # noqa: SLF001 - no public name
        try:
            weight = compiled(*arguments)
        except Exception as error:  # noqa: BLE001 - a compiler fails in any way there is
            first = (str(error).strip().splitlines() or [""])[0]
            return f"torch could not compile here ({type(error).__name__}: {first})"
        if not torch.equal(weight, unpack_weight(*arguments)):
            return "what torch compiled here unpacks other weights"
    return None
