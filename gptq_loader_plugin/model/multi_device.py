"""Have activations follow a model over its devices, by accelerate's hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.transformers_compat import LAYER_CACHE_NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["follow_devices"]


def follow_devices(model: PreTrainedModel, plan: Plan) -> bool:
    """Move what a part of the model is given to its device, and its answer back; say if needed.

    Keys and values stay where their block is: a cache is never moved.
    """
    names = {place.device.torch_name for place in plan.placed.values()}
    if len(names) < 2:
        return False
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for path, where in plan.placed.items():
        hook = AlignDevicesHook(
            execution_device=where.device.torch_name,
            io_same_device=True,
            skip_keys=list(LAYER_CACHE_NAMES),
        )
        add_hook_to_module(model.get_submodule(path), hook, append=True)
    return True
