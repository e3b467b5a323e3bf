"""Show a plan: which kernel runs which layers and why, and how much memory it takes."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio import elements
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.planning.choose import Choice
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["Memory", "memory_html", "memory_of", "plan_html"]

PROMPT_PART = 2048  # tokens of a prompt that are read at once (generate.py)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a model takes in memory, by part.

    Attributes:
        weights: the weights.
        kv: keys and values of a full context.
        scratch: about what reading a part of a prompt takes in addition.
        context: the longest sequence.
        total: all the memory of the device, where known.
    """

    weights: int
    kv: int
    scratch: int
    context: int
    total: int | None


def memory_of(plan: Plan, *, context: int | None = None) -> Memory:
    """Add up what a plan takes; the context is config.json's where none was chosen."""
    shape = plan.shape
    longest = context or shape.context or 0
    size = 4 if plan.dtype == "float32" else 2
    hidden = shape.hidden_size or 0
    inner = shape.intermediate_size or 4 * hidden
    rows = min(PROMPT_PART, longest or PROMPT_PART)
    scratch = rows * (4 * hidden + 2 * inner) * size + 4 * (shape.vocab_size or 0)
    return Memory(
        weights=plan.weight_bytes,
        kv=(plan.kv_bytes_per_token or 0) * longest,
        scratch=scratch,
        context=longest,
        total=plan.device.memory_bytes,
    )


def plan_html(plan: Plan) -> str:
    """Draw the table of kernels: a block of rows for each kind of layer, the chosen one first."""
    kinds: dict[tuple[tuple[str, str], ...], list[Choice]] = {}
    for choice in plan.choices:
        kinds.setdefault(choice.reasons(), []).append(choice)
    bodies = []
    for reasons, choices in kinds.items():
        shapes = dict.fromkeys(
            f"{choice.layer.in_features}x{choice.layer.out_features}" for choice in choices
        )
        widths = ", ".join(dict.fromkeys(f"{choice.layer.bits}-bit" for choice in choices))
        title = f"{len(choices)} layers, {widths}: {', '.join([*shapes][:4])}"
        rows = "".join(
            f"<tr{' class=chosen' if i == 0 else ''}><th scope='row'>{escape(name)}</th>"
            f"<td>{escape(reason)}</td></tr>"
            for i, (name, reason) in enumerate(reasons)
        )
        heading = f"<tr><th colspan='2' scope='rowgroup'>{escape(title)}</th></tr>"
        bodies.append(f"<tbody>{heading}{rows}</tbody>")
    name = f" ({escape(plan.device.name)})" if plan.device.name else ""
    return (
        f"<p id='{elements.PLAN_HEADLINE}'>{escape(plan.headline())}{name}</p>"
        f"<table><caption>Kernels, and why</caption>{''.join(bodies)}</table>"
    )


def memory_html(memory: Memory, *, before: int | None = None, after: int | None = None) -> str:
    """Draw the memory by part as a bar, and what the process held before and after the load."""
    context = f"{memory.context:,} tokens of context" if memory.context else "context"
    parts = [
        ("weights", "Weights", memory.weights),
        ("kv", f"Keys and values of {context}", memory.kv),
        ("scratch", "Working memory, about", memory.scratch),
    ]
    total = sum(size for _, _, size in parts)
    whole = max(total, memory.total or 0, 1)
    bars = "".join(
        f"<i class='{kind}' style='flex-grow:{max(size / whole, 0.004):.4f}' "
        f"title='{escape(name)}: {write_size(size)}'></i>"
        for kind, name, size in parts
        if size
    )
    if memory.total and memory.total > total:
        bars += f"<i class='free' style='flex-grow:{(memory.total - total) / whole:.4f}'></i>"
    legend = "".join(
        f"<li class='{kind}'>{escape(name)} <b>{write_size(size)}</b></li>"
        for kind, name, size in parts
        if size
    )
    of = f" of {write_size(memory.total)}" if memory.total else ""
    if memory.total:
        share = total / memory.total
        of += f" ({share:.0%})" if share >= 0.01 else " (less than 1%)"
    caption = f"Up to {write_size(total)}{of} on this device"
    if before is not None and after is not None:
        caption += f"; the process held {write_size(before)} before, and {write_size(after)} after"
    return (
        f"<figure class='memory'><figcaption>{caption}</figcaption>"
        f"<div role='img' aria-label='{escape(caption)}'>{bars}</div><ul>{legend}</ul></figure>"
    )
