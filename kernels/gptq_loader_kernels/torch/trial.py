"""Compile what unpacks weights, once for each kind of layer, and hold it to the plain operators."""

from __future__ import annotations

import logging
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

    Each kind of layer and each shape is tried when the first such layer is prepared, with sizes
    left open, so that no reply waits for a compiler and nothing is compiled while a CUDA graph is
    captured.

    Args:
        reason: why nothing is compiled there, or None.
    """

    def __init__(self, reason: str | None) -> None:
        self.reason = reason
        self._tried: set[tuple[Any, ...]] = set()
        self._compiled: Callable[..., torch.Tensor] | None = None

    def compile(self, module: TorchLinear) -> None:
        """Have a layer unpacked by compiled code, where that can be had and unpacks the same."""
        if self.reason is not None:
            return
        if self._compiled is None:
            # Not fullgraph: past torch's limit of kinds in one process it would raise, in a reply.
            self._compiled = torch.compile(
                unpack_weight, dynamic=True, options={"compile_threads": 1}
            )
        if (kind := _kind(module)) not in self._tried:
            self._tried.add(kind)
            self.reason = _compare(self._compiled, module)
        if self.reason is not None:
            logger.info("weights are unpacked operator by operator: %s", self.reason)
            return
        module.unpack_weight = self._compiled


def _kind(module: TorchLinear) -> tuple[Any, ...]:
    """Return what code may be generated anew for."""
    tables = (module.scales.shape, module.zeros.shape, module.groups is None)
    return (module.bits, module.in_features, module.dtype, module.scales_dtype, *tables)


@torch.inference_mode()
def _compare(compiled: Callable[..., torch.Tensor], module: TorchLinear) -> str | None:
    """Unpack a layer's first part by compiled code: why that is not to be, or None."""
    for columns in (module.tile_columns, module.part_columns):
        arguments = module.unpack_arguments(0, min(columns, module.out_features), module.dtype)
        try:
            weight = compiled(*arguments)
        except Exception as error:  # noqa: BLE001 - a compiler fails in any way there is
            first = (str(error).strip().splitlines() or [""])[0]
            return f"torch could not compile here ({type(error).__name__}: {first})"
        if not torch.equal(weight, unpack_weight(*arguments)):
            return "what torch compiled here unpacks other weights"
    return None
