"""Explain what would run inside vLLM: who takes the checkpoint, and each layer's kernel and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from gptq_loader_extensions.vllm.options import NAME
from gptq_loader_extensions.vllm.planning.eligibility import reason_for_us, refusal, taken_unasked
from gptq_loader_extensions.vllm.planning.fused_layers import expert_layers, joined_layers
from gptq_loader_plugin.opening import plan_load
from gptq_loader_plugin.planning.choose import choose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint
    from gptq_loader_plugin.kernel import LayerSpec
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.planning.plan import Plan
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["VllmPlan", "plan_for_vllm"]

Taker = Literal["vllm", "gptq_loader"]
PLAIN_BYTES = 2  # of a dequantised weight
JOINED_OF = {"qkv_proj": "q, k and v in one", "gate_up_proj": "gate and up in one"}


@dataclass(frozen=True, slots=True)
class VllmPlan:
    """What a load by vLLM will do.

    Attributes:
        plan: each of vLLM's layers with the kernel of this package that would run it.
        refused: why vLLM's own GPTQ would not run the checkpoint, or would be wrong; or None.
        unasked: whether the plug-in then takes it in `vllm serve` without being asked by name.
        asked: why `gptq-loader serve --engine vllm` asks for the plug-in by name for what vLLM
            would run, or None.
        experts: how many layers are experts of a mixture, which are dequantised.
        installed: the vLLM that is here, such as "vllm 0.32.0", or why none can be used.
    """

    plan: Plan
    refused: str | None
    unasked: bool
    asked: str | None
    experts: int
    installed: str

    @property
    def taker(self) -> Taker:
        """Who runs the quantised layers under `gptq-loader serve --engine vllm`."""
        return "vllm" if self.refused is None and self.asked is None else "gptq_loader"

    def headline(self) -> str:
        """Say in one line what runs."""
        if self.taker == "vllm":
            return f"vLLM's own GPTQ on {self.plan.device}"
        return self.plan.headline()

    def explain(self) -> str:
        """Say who takes the checkpoint and why, which kernels run, and what the others said."""
        lines = [f"in vLLM ({self.installed}):"]
        if self.refused is not None:
            lines += [
                f"  vLLM does not run it rightly by itself: {self.refused}",
                f"  so {NAME} takes it, in gptq-loader serve --engine vllm and in vllm serve"
                + ("" if self.unasked else f" --quantization {NAME}"),
            ]
        else:
            lines.append(f"  vLLM runs it by itself, as auto_gptq, in vllm serve {self.plan.path}")
            lines.append(
                f"  gptq-loader serve --engine vllm asks for {NAME}: {self.asked}"
                if self.asked
                else "  and in gptq-loader serve --engine vllm; its log names the kernel it chose"
            )
        if self.experts:
            lines.append(
                f"  {self.experts} layers are experts, which are dequantised once: vLLM runs all "
                "experts in one kernel over plain weights"
            )
        if self.taker == "vllm":
            lines.append(f"  asked for by name, --quantization {NAME}, it would run so:")
        lines += [f"    {it}" for it in _kinds(self.plan)]
        return "\n".join([*lines, "", self.plan.explain()])

    def to_json(self) -> dict[str, Any]:
        """Give it as plain data, for `explain --engine vllm --json`."""
        return {
            **self.plan.to_json(),
            "engine": "vllm",
            "installed": self.installed,
            "taken_by": self.taker,
            "refused_by_vllm": self.refused,
            "taken_unasked": self.unasked,
            "asked_for_because": self.asked,
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
        plugins: whose kernels are asked.
        reference: what the user typed.
        installed: which vLLM is here, in words.

    Raises:
        NoBackend: a layer that no kernel, or not the one named, can run.
        UnsupportedFormat: some of what vLLM joins is quantised, and some is not.
    """
    layers, experts = joined_layers(checkpoint), expert_layers(checkpoint)
    # a mixture's experts are dequantised, so what kernels say of them is left out below
    whole = plan_load(checkpoint, options, plugins, reference=reference)
    backend = options.backend
    return VllmPlan(
        plan=_chosen_anew(whole, layers, experts, plugins, backend),
        refused=refusal(checkpoint, layers, whole.device),
        unasked=taken_unasked(checkpoint),
        asked=reason_for_us(whole.device, backend=backend, dtype=options.dtype_name),
        experts=len(experts),
        installed=installed,
    )


def _chosen_anew(
    plan: Plan,
    layers: Sequence[LayerSpec],
    experts: Sequence[LayerSpec],
    plugins: Plugins,
    backend: str | None,
) -> Plan:
    """Choose for vLLM's layers, in place of the checkpoint's."""
    other = plan.not_built
    # without ExLlama's extension there is no asking for it
    other_backend = None if backend == "exllama" else backend
    choices = tuple(choose(it, plan.device, plugins.kernels(), only=backend) for it in layers)
    before = sum(it.chosen.prepared_bytes for it in plan.choices)
    after = sum(it.chosen.prepared_bytes for it in choices)
    plain = sum(it.in_features * it.out_features * PLAIN_BYTES for it in experts)
    return replace(
        plan,
        choices=choices,
        weight_bytes=plan.weight_bytes - before + after + plain,
        not_built=other and _chosen_anew(other, layers, experts, plugins, other_backend),
    )


def _kinds(plan: Plan) -> list[str]:
    """Name vLLM's layers of each kind, with their kernel."""
    counted = Counter(
        (_last(it.layer.name), f"{it.layer.in_features}x{it.layer.out_features}", it.chosen.kernel)
        for it in plan.choices
    )
    rows = [
        (f"{count} {name}", shape, f"{kernel} ({JOINED_OF[name]})" if name in JOINED_OF else kernel)
        for (name, shape, kernel), count in counted.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(2)] if rows else []
    return [f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {kernel}" for name, shape, kernel in rows]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
