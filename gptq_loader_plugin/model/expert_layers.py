"""Which linears of an expert a layer of a checkpoint becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gptq_loader_plugin.verdict import Accepted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear
    from gptq_loader_plugin.model.experts import PackedExperts
    from gptq_loader_plugin.planning.choose import Choice
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["expert_layers"]


def expert_layers(
    choice: Choice, role: str, experts: PackedExperts, packed: PackedLinear, plan: Plan
) -> Iterator[tuple[str, LayerSpec, PackedLinear]]:
    """Cut a layer that is an expert's gate and up in one, where it runs on a CPU.

    Its columns alternate in some models. Apart, they are what native steps multiply.

    Args:
        choice: the layer, and the kernel that runs it.
        role: "gate", "up", "gate_up" or "down".
        experts: what the expert is of.
        packed: the layer's tensors.
        plan: where the layer runs.

    Yields:
        Each linear's role, its spec and its tensors.
    """
    layer, device = choice.layer, plan.place(choice.layer.name).device
    if role == "gate_up" and device.type == "cpu":
        columns = experts.layout.cut(layer.out_features)
        parts = {
            name: replace(layer, name=f"{layer.name}.{name}", out_features=len(own))
            for name, own in columns.items()
        }
        if all(isinstance(choice.kernel.consider(it, device), Accepted) for it in parts.values()):
            for name, part in parts.items():
                yield name, part, packed.take_columns(columns[name])
            return
    yield role, layer, packed
