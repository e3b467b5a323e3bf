"""Show which model this is and how it runs: the page's header."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio import elements
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.jobs.models import Loaded
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["NO_MODEL", "entry_name", "header_html", "model_facts", "title"]

NO_MODEL = "No model is loaded"


def entry_name(model: LoadedModel) -> str:
    """Return a model's name in lists: the reference, or a folder's own name, not its path."""
    plan = model.plan
    is_path = plan.reference != "demo" and Path(plan.reference).exists()
    return plan.path.resolve().name if is_path else plan.reference


def title(loaded: Loaded | None) -> str:
    """Return the model's name for people: for the demo, its real name."""
    if loaded is None:
        return NO_MODEL
    return loaded.model.plan.path.resolve().name if loaded.name == "demo" else loaded.name


def model_facts(model: LoadedModel) -> list[str]:
    """Describe in a few words each how a model was quantised and what it takes."""
    config = model.config
    return [
        f"{config.bits}-bit",
        "no groups" if config.group_size < 0 else f"groups of {config.group_size}",
        "act-order" if config.desc_act else "no act-order",
        "symmetric" if config.sym else "asymmetric",
        f"{write_size(model.plan.weight_bytes)} in memory",
        f"context {model.context:,}",
    ]


def header_html(loaded: Loaded | None) -> str:
    """Show the name, what the checkpoint is, how it runs, and the warnings."""
    if loaded is None:
        return (
            f"<header><h1>{NO_MODEL}</h1></header>"
            "<p>Choose one in the Model tab; it is loaded at once.</p>"
        )
    model = loaded.model
    chips = "".join(f"<li>{escape(fact)}</li>" for fact in model_facts(model))
    warnings = dict.fromkeys((*model.warnings, *model.plan.warnings))
    notes = "".join(f"<p role='note'>{escape(warning)}</p>" for warning in warnings)
    template = f"{model.template.name} ({model.template.source})"
    why = f"<pre tabindex='0'>{escape(model.explain())}</pre>"
    return (
        f"<header><h1>{escape(title(loaded))}</h1><ul>{chips}</ul></header>"
        f"<dl><dt>Kernel</dt><dd><details id='{elements.WHY}'><summary>"
        f"<span id='{elements.HEADLINE}'>"
        f"{escape(model.plan.headline())}</span> <b>Why?</b></summary>{why}</details></dd>"
        f"<dt>Template</dt><dd id='{elements.TEMPLATE}'>{escape(template)}</dd></dl>{notes}"
    )
