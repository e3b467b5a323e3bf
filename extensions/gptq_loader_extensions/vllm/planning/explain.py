"""Explain what would run inside vLLM: whose GPTQ, and each layer's kernel and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from gptq_loader_extensions.vllm.options import NAME
from gptq_loader_extensions.vllm.planning.eligibility import (
    is_taken_by_default,
    reason_to_request,
    refusal,
)
from gptq_loader_extensions.vllm.planning.fused_layers import expert_layers, fused_layers
from gptq_loader_plugin.opening import plan_load
from gptq_loader_plugin.planning.choose import choose
from gptq_loader_plugin.planning.plan import shared_scratch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint
    from gptq_loader_plugin.kernel import LayerSpec
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.planning.plan import Plan
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["VllmPlan", "plan_for_vllm"]

Implementation = Literal["vllm", "gptq_loader"]
PLAIN_BYTES = 2  # of a dequantised weight
FUSED_LABELS = {"qkv_proj": "q, k and v in one", "gate_up_proj": "gate and up in one"}


@dataclass(frozen=True, slots=True)
class VllmPlan:
    """What a load by vLLM will do.

    Attributes:
        plan: each of vLLM's layers with the kernel of this package that would run it.
        refusal: why vLLM's own GPTQ would not run the checkpoint, or not correctly; or None.
        by_default: whether the plug-in then takes it in `vllm serve` without being named.
        reason: why `gptq-loader serve --engine vllm` requests the plug-in for what vLLM itself
            would run, or None.
        experts: how many layers are experts of a mixture, which are dequantised.
        installed: the vLLM that is here, such as "vllm 0.32.0", or why none can be used.
    """

    plan: Plan
    refusal: str | None
    by_default: bool
    reason: str | None
    experts: int
    installed: str

    @property
    def implementation(self) -> Implementation:
        """Whose GPTQ runs the layers under `gptq-loader serve --engine vllm`."""
        return "vllm" if self.refusal is None and self.reason is None else "gptq_loader"

    def headline(self) -> str:
        """Return in one line what runs."""
        if self.implementation == "vllm":
            return f"vLLM's own GPTQ on {self.plan.device}"
        return self.plan.headline()

    def explain(self) -> str:
        """Return whose GPTQ runs and why, which kernels, and what the other kernels answered."""
        lines = [f"in vLLM ({self.installed}):"]
        if self.refusal is not None:
            lines += [
                f"  vLLM does not run it correctly by itself: {self.refusal}",
                f"  so {NAME} runs it, in gptq-loader serve --engine vllm and in vllm serve"
                + ("" if self.by_default else f" --quantization {NAME}"),
            ]
        else:
            lines.append(f"  vLLM runs it by itself, as auto_gptq, in vllm serve {self.plan.path}")
            lines.append(
                f"  gptq-loader serve --engine vllm requests {NAME}: {self.reason}"
                if self.reason
                else "  and in gptq-loader serve --engine vllm; its log names the kernel it chose"
            )
        if self.experts:
            lines.append(
                f"  {self.experts} layers are experts, which are dequantised once: vLLM runs all "
                "experts in one kernel over plain weights"
            )
        if self.implementation == "vllm":
            lines.append(f"  with --quantization {NAME} it would run so:")
        lines += [f"    {row}" for row in _table_of_layers(self.plan)]
        return "\n".join([*lines, "", self.plan.explain()])

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, for `explain --engine vllm --json`."""
        return {
            **self.plan.to_json(),
            "engine": "vllm",
            "installed": self.installed,
            "taken_by": self.implementation,
            "refused_by_vllm": self.refusal,
            "taken_unasked": self.by_default,
            "asked_for_because": self.reason,
            "experts": self.experts,
        }


def plan_for_vllm(
    checkpoint: GPTQCheckpoint,
    options: LoadOptions,
    plugins: Plugins,
    *,
    reference: str,
    installed: str,
) -> VllmPlan:
    """Plan a load by vLLM from headers, g_idx and qzeros.

    Args:
        checkpoint: the open checkpoint.
        options: the device where vLLM will run it, a kernel for every layer, the dtype to compute
            in.
        plugins: the kernels to choose from.
        reference: the reference that the user typed.
        installed: the vLLM that is here.

    Raises:
        NoBackend: no kernel, or not the one named, can run a layer.
        UnsupportedFormat: of the layers that vLLM fuses into one, only some are quantised.
    """
    layers, experts = fused_layers(checkpoint), expert_layers(checkpoint)
    # a mixture's experts are dequantised, so the choices of their kernels are dropped below
    plan = plan_load(checkpoint, options, plugins, reference=reference)
    backend = options.backend
    return VllmPlan(
        plan=_choose_for_vllm(plan, layers, experts, plugins, backend),
        refusal=refusal(checkpoint, layers, plan.device),
        by_default=is_taken_by_default(checkpoint, plan.device),
        reason=reason_to_request(plan.device, backend=backend, dtype=options.dtype_name),
        experts=len(experts),
        installed=installed,
    )


def _choose_for_vllm(
    plan: Plan,
    layers: Sequence[LayerSpec],
    experts: Sequence[LayerSpec],
    plugins: Plugins,
    backend: str | None,
) -> Plan:
    """Choose for vLLM's layers, in place of the checkpoint's."""
    other = plan.not_built
    # without ExLlama's extension it cannot be requested
    other_backend = None if backend == "exllama" else backend
    choices = tuple(choose(layer, plan.device, plugins.kernels(), only=backend) for layer in layers)
    before = sum(choice.chosen.prepared_bytes for choice in plan.choices)
    after = sum(choice.chosen.prepared_bytes for choice in choices)
    plain = sum(layer.in_features * layer.out_features * PLAIN_BYTES for layer in experts)
    return replace(
        plan,
        choices=choices,
        weight_bytes=plan.weight_bytes - before + after + plain,
        scratch_bytes=shared_scratch(choices, plan.placed),
        not_built=other and _choose_for_vllm(other, layers, experts, plugins, other_backend),
    )


def _table_of_layers(plan: Plan) -> list[str]:
    """Return a row for each kind of layer in vLLM's model, with its kernel."""
    counts = Counter(
        (
            choice.layer.name.rpartition(".")[2],
            f"{choice.layer.in_features}x{choice.layer.out_features}",
            choice.chosen.kernel,
        )
        for choice in plan.choices
    )
    rows = [
        (
            f"{count} {name}",
            shape,
            f"{kernel} ({FUSED_LABELS[name]})" if name in FUSED_LABELS else kernel,
        )
        for (name, shape, kernel), count in counts.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)] if rows else []
    return [f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {kernel}" for name, shape, kernel in rows]
