"""Say in HTML which model this is and how it runs: the page's head."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio import elements
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Loaded
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["NO_MODEL", "entry_name", "facts_of", "head", "title"]

NO_MODEL = "No model is loaded"


def entry_name(model: LoadedModel) -> str:
    """Give the name a list has for a model: the reference, or a folder's own name, not its path."""
    plan = model.plan
    is_path = plan.reference != "demo" and Path(plan.reference).exists()
    return plan.path.resolve().name if is_path else plan.reference


def title(loaded: Loaded | None) -> str:
    """Name the model for people: the demo's real name, for one."""
    if loaded is None:
        return NO_MODEL
    return loaded.model.plan.path.resolve().name if loaded.name == "demo" else loaded.name


def facts_of(model: LoadedModel) -> list[str]:
    """Say in a few words each how a model was quantised and what it takes."""
    config = model.config
    return [
        f"{config.bits}-bit",
        "no groups" if config.group_size < 0 else f"groups of {config.group_size}",
        "act-order" if config.desc_act else "no act-order",
        "symmetric" if config.sym else "asymmetric",
        f"{write_size(model.plan.weight_bytes)} in memory",
        f"context {model.context:,}",
    ]


def head(loaded: Loaded | None) -> str:
    """Say the name, what the checkpoint is, how it runs, and what to be warned of."""
    if loaded is None:
        return (
            f"<header><h1>{NO_MODEL}</h1></header>"
            "<p>Choose one in the Model tab; it is loaded at once.</p>"
        )
    model = loaded.model
    chips = "".join(f"<li>{escape(fact)}</li>" for fact in facts_of(model))
    warnings = dict.fromkeys((*model.warnings, *model.plan.warnings))
    noted = "".join(f"<p role='note'>{escape(it)}</p>" for it in warnings)
    template = f"{model.template.name} ({model.template.source})"
    why = f"<pre tabindex='0'>{escape(model.explain())}</pre>"
    return (
        f"<header><h1>{escape(title(loaded))}</h1><ul>{chips}</ul></header>"
        f"<dl><dt>Kernel</dt><dd><details id='{elements.WHY}'><summary>"
        f"<span id='{elements.HEADLINE}'>"
        f"{escape(model.plan.headline())}</span> <b>Why?</b></summary>{why}</details></dd>"
        f"<dt>Template</dt><dd id='{elements.TEMPLATE}'>{escape(template)}</dd></dl>{noted}"
    )
