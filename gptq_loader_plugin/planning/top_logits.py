"""Plan the copy of the head that finds a model's top logits, and count its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gptq_loader_plugin.kernel import LayerSpec, TopLogitsKernel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.kernel import Kernel
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["GROUP_SIZE", "ZERO", "find_kernel", "head_spec", "plan_top_logits"]

GROUP_SIZE = 64  # of a head that is made 8-bit here
ZERO = 128
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def plan_top_logits(plan: Plan, checkpoint: Checkpoint, kernels: Iterable[Kernel]) -> Plan:
    """Add to a plan the memory of the head's 8-bit copy, where one will be made."""
    kernel = find_kernel(plan, kernels)
    if kernel is None or not (checkpoint.folder / "config.json").is_file():
        return plan
    config, headers = checkpoint.model_config, checkpoint.headers
    name = HEAD if HEAD in headers and not config.get("tie_word_embeddings") else EMBEDDING
    if name not in headers or HEAD.removesuffix(".weight") in checkpoint.layers:
        return plan
    head = head_spec(*headers[name].shape, scales_dtype="float32")
    added = kernel.top_logits_bytes(config, head)
    return replace(plan, weight_bytes=plan.weight_bytes + added)


def head_spec(
    columns: int, rows: int, *, scales_dtype: str = "float16", bias: bool = False
) -> LayerSpec:
    """Describe a head [N, K] as `quantize_rows` makes it."""
    last, whole = rows % GROUP_SIZE or GROUP_SIZE, min(GROUP_SIZE, rows)
    return LayerSpec(
        name="lm_head",
        in_features=rows,
        out_features=columns,
        bits=8,
        group_size=GROUP_SIZE,
        desc_act=False,
        sym=True,
        groups=-(-rows // GROUP_SIZE),
        group_rows=(last, whole),
        group_unit=next(
            unit for unit in (64, 32, 16, 8, 4) if last % unit == 0 and whole % unit == 0
        ),
        zero_range=(ZERO, ZERO),
        scales_dtype=scales_dtype,
        bias=bias,
    )


def find_kernel(plan: Plan, kernels: Iterable[Kernel]) -> TopLogitsKernel | None:
    """Find the kernel in the plan that can do it, for a model on one device."""
    if plan.placed:
        return None
    chosen = plan.kernels()
    return next(
        (
            kernel
            for kernel in kernels
            if kernel.name in chosen and isinstance(kernel, TopLogitsKernel)
        ),
        None,
    )
