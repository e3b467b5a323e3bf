"""What a kernel is: a thing that may accept a layer, prepare its tensors once, and multiply.

A kernel answers `consider` from shapes alone, before any weight is read, so a choice can be made
and explained for a checkpoint or a device that is not on this machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel.layer import LayerSpec, PackedLinear
    from gptq_loader_plugin.verdict import Verdict


__all__ = ["Kernel"]


@runtime_checkable
class Kernel(Protocol):
    """A way to multiply by a quantised weight."""

    @property
    def name(self) -> str:
        """The name users pass as `backend=`, and `explain` prints."""
        ...

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Accept or decline `layer` on `device`. Import nothing heavy, read no weight."""
        ...

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Lay the tensors out as the kernel wants them; called once per layer.

        The module is a plain y = x @ W.T + bias: x [..., in_features] in its original order and
        in any floating dtype, y [..., out_features] in x's dtype.
        """
        ...
