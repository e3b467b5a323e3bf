"""Whether a checkpoint fits this machine, and why: its weights and a context, and the disk."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptq_loader_plugin.device import find_devices
from gptq_loader_plugin.errors import NoBackend
from gptq_loader_plugin.planning.placement import LEFT_FREE
from gptq_loader_plugin.planning.plan import make_plan
from gptq_loader_plugin.planning.top_logits import plan_top_logits
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec
    from gptq_loader_plugin.verdict import Verdict

__all__ = ["Fit", "check_fit"]


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a checkpoint fits this machine.

    Attributes:
        fits: yes, no, or None where that cannot be known.
        reason: why, in words.
        weight_bytes: what its weights take in memory.
        kv_bytes: what the context takes.
        context: the tokens of context that this is for.
    """

    fits: bool | None
    reason: str
    weight_bytes: int | None = None
    kv_bytes: int | None = None
    context: int | None = None


def check_fit(
    checkpoint: Checkpoint,
    device: Device,
    kernels: Sequence[Kernel],
    *,
    context: int,
    disk: tuple[int, int] | None = None,
) -> Fit:
    """Compare what a checkpoint takes with what a device and a disk have.

    Args:
        checkpoint: the checkpoint, or its outline.
        device: where it would run.
        kernels: the kernels to ask: what a layer takes depends on the one it gets.
        context: the tokens of context to keep room for; no more than the model can have.
        disk: the bytes to download, and the bytes free, where it must be downloaded.

    Raises:
        ConfigInvalid: its config.json does not parse, or names no model type.
    """
    try:
        kinds = {name: replace(layer, name="") for name, layer in checkpoint.layers.items()}
        plan = make_plan(
            checkpoint,
            device,
            [_Remembering(kernel, kinds) for kernel in kernels],
            reference=str(checkpoint.path),
        )
        plan = plan_top_logits(plan, checkpoint, kernels)
    except NoBackend as error:
        return Fit(fits=False, reason=error.message.partition(":")[0])
    context = min(context, plan.shape.context or context)
    kv_bytes = (plan.kv_bytes_per_token or 0) * context
    fit = Fit(
        fits=None,
        reason="",
        weight_bytes=plan.weight_bytes,
        kv_bytes=kv_bytes,
        context=context,
    )
    return _judged(fit, plan.memory_bytes + kv_bytes, device, disk)


class _Remembering:
    """A kernel that is asked once about each kind of layer: a model has few kinds, a list many."""

    def __init__(self, kernel: Kernel, kinds: Mapping[str, LayerSpec]) -> None:
        self.name = kernel.name
        self.prepare = kernel.prepare
        self._kernel = kernel
        self._kinds = kinds
        self._answers: dict[LayerSpec, Verdict] = {}

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        kind = self._kinds[layer.name]
        if kind not in self._answers:
            self._answers[kind] = self._kernel.consider(layer, device)
        return self._answers[kind]


def _judged(fit: Fit, taken: int, device: Device, disk: tuple[int, int] | None) -> Fit:
    needs = f"needs {write_size(taken)} ({write_size(fit.weight_bytes or 0)} of weights" + (
        f", {write_size(fit.kv_bytes)} for {fit.context:,} tokens)"
        if fit.kv_bytes
        else "; what a context takes is not known)"
    )
    if disk is not None and disk[0] > disk[1]:
        size, free = (write_size(count) for count in disk)
        return replace(fit, fits=False, reason=f"{size} to download, and {free} of disk are free")
    if device.memory_bytes is None:
        return replace(fit, reason=f"{needs}; how much memory {device} has is not known")
    usable = int(device.memory_bytes * LEFT_FREE)
    has = f"{device} has {write_size(device.memory_bytes)}"
    if taken <= usable:
        return replace(fit, fits=True, reason=f"{needs}; {has}")
    reason = f"{needs}; {has}, a tenth of which is left free"
    together = sum(device.memory_bytes or 0 for device in find_devices()) * LEFT_FREE
    if device.present and device.type != "cpu" and taken <= together:
        reason += "; with --device-map auto the CPU takes the rest"
    return replace(fit, fits=False, reason=reason)
