"""Say in HTML which model this is and how it runs: the page's head."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.plan import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.loaded import LoadedModel

__all__ = ["head", "model_name"]


def model_name(model: LoadedModel) -> str:
    """Give the model's name: a folder's own, or the reference as the user typed it."""
    plan = model.plan
    if plan.reference == "demo" or Path(plan.reference).exists():
        return plan.path.resolve().name
    return plan.reference


def head(model: LoadedModel) -> str:
    """Say the name, what the checkpoint is, how it runs, and what to be warned of."""
    config = model.config
    facts = [
        f"{config.bits}-bit",
        "no groups" if config.group_size < 0 else f"groups of {config.group_size}",
        "act-order" if config.desc_act else "no act-order",
        "symmetric" if config.sym else "asymmetric",
        f"{write_size(model.plan.weight_bytes)} in memory",
        f"context {model.context:,}",
    ]
    chips = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    warnings = dict.fromkeys((*model.warnings, *model.plan.warnings))
    noted = "".join(f"<p role='note'>{escape(it)}</p>" for it in warnings)
    template = f"{model.template.name} ({model.template.source})"
    why = f"<pre tabindex='0'>{escape(model.explain())}</pre>"
    return (
        f"<header><h1>{escape(model_name(model))}</h1><ul>{chips}</ul></header>"
        f"<dl><dt>Kernel</dt><dd><details id='why'><summary><span id='headline'>"
        f"{escape(model.plan.headline())}</span> <b>Why?</b></summary>{why}</details></dd>"
        f"<dt>Template</dt><dd id='template'>{escape(template)}</dd></dl>{noted}"
    )
