"""Whether a device's free memory holds a model comfortably, which some kernels' ranks go by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.planning.free_memory import free_bytes
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.planning.model_shape import ModelShape

__all__ = ["Headroom", "check_headroom"]

CONTEXT = 8192  # tokens, or the model's own context where that is shorter
OVERHEAD = 1.1  # of the weights: a load's own buffers, and a prompt's activations
LEFT_FREE = 10**9  # bytes: a driver's context and torch's libraries take half of it on a GPU


@dataclass(frozen=True, slots=True)
class Headroom:
    """Whether a model fits comfortably, and why, as part of a sentence."""

    fits: bool
    words: str


def check_headroom(
    device: Device, *, memory_bytes: int, kv_bytes_per_token: int | None, shape: ModelShape
) -> Headroom:
    """Compare what a model and a context take with what is free on a device.

    Args:
        device: where it would run.
        memory_bytes: what the weights take there, and products by them.
        kv_bytes_per_token: what a token of context takes, where that is known.
        shape: the model's.
    """
    cache = (kv_bytes_per_token or 0) * min(shape.context or CONTEXT, CONTEXT)
    needed = int(memory_bytes * OVERHEAD) + cache + LEFT_FREE
    words = f"needs {write_size(needed)} with a context, and"
    free = free_bytes(device)
    if free is None:
        return Headroom(fits=False, words=f"{words} what is free is not known")
    return Headroom(fits=needed <= free, words=f"{words} {write_size(free)} is free")
