"""Check every layer's kernel against the layer's dequantised weight, on a few rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import PluginError
from gptq_loader_plugin.model.self_check import check_layer
from gptq_loader_plugin.opening import plan_load
from gptq_loader_plugin.planning.choose import prepared
from gptq_loader_plugin.verify.report import Finding

if TYPE_CHECKING:
    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["check_kernels"]


def check_kernels(checkpoint: Checkpoint, options: LoadOptions, plugins: Plugins) -> list[Finding]:
    """Prepare each layer by the kernel that a load would choose, and multiply a few rows.

    A load checks one layer of each kind (model/self_check.py); this one checks all, one at a time.
    """
    findings = []
    plan = plan_load(checkpoint, options, plugins, reference=str(checkpoint.path))
    for choice in plan.choices:
        name = choice.layer.name
        try:
            device = plan.place(name).device
            module = prepared(choice.kernel, choice.layer, checkpoint.packed(name), device)
            check_layer(module, choice, checkpoint, plan)
        except PluginError as error:
            findings.append(
                Finding("kernels", wrong=True, message=error.message, where=name, fix=error.hint)
            )
    return findings
