"""Find the top logits without reading the whole head, where a kernel can (`TopLogitsKernel`).

A head is read whole for each token, in a small model half of all that is read. Tokens are sampled
among the top logits, so an 8-bit copy of the head is read to find which may be among these, and the
head itself for those alone: the tokens sampled, and their logits, are those of the whole head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gptq_loader_plugin.planning.top_logits import find_kernel
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from gptq_loader_plugin.kernel import Kernel
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["add_top_logits"]


def add_top_logits(
    model: PreTrainedModel, plan: Plan, kernels: Iterable[Kernel]
) -> tuple[Plan, tuple[str, ...]]:
    """Have a loaded model's head return its top logits alone, where a kernel can.

    Returns:
        The plan, with the memory this takes counted, and notes on what was done.
    """
    kernel = find_kernel(plan, kernels)
    extra = 0 if kernel is None else kernel.add_top_logits(model)
    if not extra:
        return plan, ()
    note = (
        f"samples by a copy of the head in 8 bits ({write_size(extra)}), and by the head "
        "itself where that may decide: the same tokens"
    )
    return replace(plan, weight_bytes=plan.weight_bytes + extra), (note,)
