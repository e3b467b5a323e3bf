"""Whether ExLlama's kernels could run a checkpoint: the card's own column."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptq_loader_plugin.device import Device
from gptq_loader_plugin.planning.dequantized import is_dequantized
from gptq_loader_plugin.verdict import Declined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Kernel

__all__ = ["ExllamaReport", "ask_exllama"]

UNREAD = "perhaps: its zeros are read only once it is here"
AMPERE = Device("cuda", capability=(8, 6), present=False, assume_built=True)


@dataclass(frozen=True, slots=True)
class ExllamaReport:
    """Whether ExLlama's kernels could run every layer of the checkpoint, and why not.

    Attributes:
        compatible: None where only its zeros would tell, and nobody has read them.
        reason: why, or why not.
    """

    compatible: bool | None
    reason: str


def ask_exllama(
    checkpoint: Checkpoint, kernels: Sequence[Kernel], *, zeros_are_read: bool = True
) -> ExllamaReport:
    """Ask the kernel named exllama about every layer, as if it were built, on a GPU it knows.

    Args:
        checkpoint: the layers.
        kernels: the kernels to ask.
        zeros_are_read: False for an outline, whose zeros may be any where they are not symmetric.
    """
    exllama = next((kernel for kernel in kernels if kernel.name == "exllama"), None)
    if exllama is None:
        return ExllamaReport(compatible=False, reason="the exllama plugin is not installed")
    layers = [layer for layer in checkpoint.layers.values() if not is_dequantized(layer.name)]
    unread = not zeros_are_read and any(not layer.sym for layer in layers)
    if unread:  # what it says of the rest; every kernel takes the middle zero
        layers = [replace(layer, zero_range=(1 << layer.bits - 1,) * 2) for layer in layers]
    verdicts = [exllama.consider(layer, AMPERE) for layer in layers]
    reasons = [verdict.reason for verdict in verdicts if isinstance(verdict, Declined)]
    if not reasons and unread:
        return ExllamaReport(compatible=None, reason=UNREAD)
    if not reasons:
        return ExllamaReport(compatible=True, reason=f"runs all {len(verdicts)} layers")
    part = (
        "" if len(reasons) == len(verdicts) else f"{len(reasons)} of {len(verdicts)} layers have "
    )
    return ExllamaReport(compatible=False, reason=f"{part}{reasons[0]}")
