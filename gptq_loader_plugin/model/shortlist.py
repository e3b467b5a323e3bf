"""Find the likeliest tokens without reading the whole head, where a kernel can (`Shortener`).

A head is read whole for each token, in a small model half of all that is read. Tokens are picked
among the likeliest, so a narrower copy of it is read to say which may be among these, and the head
itself for those: the tokens picked, and their logits, are those of the whole head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gptq_loader_plugin.planning.shortlist import (
    find_shortener,
)
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from gptq_loader_plugin.kernel import Kernel
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["shorten"]


def shorten(
    model: PreTrainedModel, plan: Plan, kernels: Iterable[Kernel]
) -> tuple[Plan, tuple[str, ...]]:
    """Have a loaded model's head give its likeliest tokens alone, where a kernel can.

    Returns:
        The plan, with what that takes, and what was done, in words.
    """
    kernel = find_shortener(plan, kernels)
    extra = 0 if kernel is None else kernel.shorten(model)
    if not extra:
        return plan, ()
    note = (
        f"picks tokens by a copy of the head in 8 bits ({write_size(extra)}), and by the head "
        "itself where that may decide: the same tokens"
    )
    return replace(plan, weight_bytes=plan.weight_bytes + extra), (note,)
