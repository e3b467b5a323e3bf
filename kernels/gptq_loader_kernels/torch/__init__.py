"""Layers of every width on any device that torch knows: unpacked a part at a time by torch itself.

Plain operators of torch, so it runs where no other kernel of ours keeps weights packed: CUDA before
sm80, AMD, Intel and Apple GPUs, and widths and groups that Triton does not take.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gptq_loader_kernels.dtypes import matmul_dtype
from gptq_loader_kernels.torch.compiler import why_not_compiled
from gptq_loader_kernels.torch.shape import Shape
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted, Finished

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from gptq_loader_kernels.torch.trial import Trials
    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear, Verdict

__all__ = ["TorchKernel", "gptq_kernels"]

RANK = 20  # above dense (10), which takes four times the memory, below every kernel that fuses


@dataclass(frozen=True, slots=True)
class TorchKernel:
    """Unpack a part of the weight, multiply by it, and go on to the next part.

    Attributes:
        name: the kernel's name.
        trials: what came of compiling, for each device that a layer was prepared on.
    """

    name: str = "torch"
    trials: dict[str, Trials] = field(default_factory=dict, repr=False, compare=False)

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept any layer anywhere."""
        dtype = matmul_dtype(device, layer)
        shape = Shape.of(layer)
        return Accepted(
            self.name,
            RANK,
            dtype=dtype,
            prepared_bytes=shape.bytes(layer, dtype),
            scratch_bytes=shape.scratch_bytes(layer, dtype, device.type),
            note=f"weights stay packed; unpacked a part at a time, to {dtype}",
        )

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Sort the rows by group, pack them in bytes, and have what unpacks them compiled."""
        from gptq_loader_kernels.torch.linear import TorchLinear
        from gptq_loader_kernels.torch.trial import Trials

        module = TorchLinear(layer, packed, device.torch_name, dtype=matmul_dtype(device, layer))
        trials = self.trials.setdefault(device.torch_name, Trials(why_not_compiled(device)))
        trials.compile(module)
        return module

    def finish(self, model: PreTrainedModel) -> Finished:
        """Say how the weights are unpacked; nothing is done to the model."""
        from gptq_loader_kernels.torch.linear import TorchLinear

        layers = [module for module in model.modules() if isinstance(module, TorchLinear)]
        trials = [self.trials[name] for name in {layer.prepared_for for layer in layers}]
        reasons = {trial.reason for trial in trials if trial.reason is not None}
        if reasons:
            return Finished(f"unpacks weights operator by operator: {'; '.join(sorted(reasons))}")
        return Finished("unpacks weights by code that torch compiled")


@hookimpl
def gptq_kernels() -> list[Kernel]:
    """Offer the torch kernel."""
    return [TorchKernel()]
