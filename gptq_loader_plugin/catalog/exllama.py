"""Whether ExLlama's kernels could run a checkpoint: the card's own column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.device import Device
from gptq_loader_plugin.planning.dequantized import is_dequantized
from gptq_loader_plugin.verdict import Declined

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Kernel

__all__ = ["ExllamaReport", "ask_exllama"]

AMPERE = Device("cuda", capability=(8, 6), present=False, assume_built=True)


@dataclass(frozen=True, slots=True)
class ExllamaReport:
    """Whether ExLlama's kernels could run every layer of the checkpoint, and why not."""

    compatible: bool
    reason: str


def ask_exllama(checkpoint: Checkpoint, kernels: Sequence[Kernel]) -> ExllamaReport:
    """Ask the kernel named exllama about every layer, as if it were built, on a GPU it knows."""
    exllama = next((kernel for kernel in kernels if kernel.name == "exllama"), None)
    if exllama is None:
        return ExllamaReport(compatible=False, reason="the exllama plugin is not installed")
    verdicts = [
        exllama.consider(layer, AMPERE)
        for layer in checkpoint.layers.values()
        if not is_dequantized(layer.name)
    ]
    reasons = [verdict.reason for verdict in verdicts if isinstance(verdict, Declined)]
    if not reasons:
        return ExllamaReport(compatible=True, reason=f"runs all {len(verdicts)} layers")
    part = (
        "" if len(reasons) == len(verdicts) else f"{len(reasons)} of {len(verdicts)} layers have "
    )
    return ExllamaReport(compatible=False, reason=f"{part}{reasons[0]}")
