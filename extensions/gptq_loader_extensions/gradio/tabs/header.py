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
# The scripts press these; they are drawn anew with the header.
ICON = "<svg viewBox='0 0 24 24' aria-hidden='true'><path d='{}'/></svg>"
TOOL = "<button type='button' data-do='{name}' aria-label='{label}' title='{title}'>{icon}</button>"
TOOLS = (
    ("chats", "Show or hide the chats", "Chats (Ctrl+B)", "M4 5h16v14H4zM9.5 5v14"),
    (
        "theme",
        "Switch between light and dark",
        "Light or dark",
        "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
    ),
    (
        "keys",
        "Keyboard shortcuts",
        "Keyboard shortcuts (Ctrl+/)",
        "M3 7h18v10H3zM7 10.5h0M11 10.5h0M15 10.5h0M8 14h8",
    ),
)
BITS = "each weight is stored in so many bits: fewer take less memory and are less exact"
GROUPS = "so many rows share a scale: smaller groups are more exact and take a little more memory"
NO_GROUPS = "a whole column shares one scale: the smallest, and the least exact"
ACT_ORDER = (
    "the columns that matter most were quantised first, which is more exact; it costs some kernels "
    "a little speed"
)
NO_ACT_ORDER = "the columns were quantised in the order of the file"
SYMMETRIC = "zero is in the middle of each scale"
ASYMMETRIC = "each scale has a zero of its own"
MEMORY = "what the weights take in the memory of the device"
CONTEXT = "how many tokens a conversation may have; a word is one or two"


def entry_name(model: LoadedModel) -> str:
    """Return a model's name in lists: the reference, or a folder's own name, not its path."""
    plan = model.plan
    is_path = plan.reference != "demo" and Path(plan.reference).exists()
    return plan.path.resolve().name if is_path else plan.reference


def title(loaded: Loaded | None) -> str:
    """Return the model's name for people: for the demo, its real name."""
    if loaded is None:
        return NO_MODEL
    if loaded.name != "demo":
        return loaded.name
    folder = loaded.model.plan.path.resolve().name  # with how it was made behind the name
    return folder.partition("-GPTQ-")[0]


def model_facts(model: LoadedModel) -> dict[str, str]:
    """Describe how a model was quantised and what it takes, each fact with what it means."""
    config = model.config
    no_groups = config.group_size < 0
    return {
        f"{config.bits}-bit": BITS,
        "no groups" if no_groups else f"groups of {config.group_size}": NO_GROUPS
        if no_groups
        else GROUPS,
        "act-order" if config.desc_act else "no act-order": ACT_ORDER
        if config.desc_act
        else NO_ACT_ORDER,
        "symmetric" if config.sym else "asymmetric": SYMMETRIC if config.sym else ASYMMETRIC,
        f"{write_size(model.plan.weight_bytes)} in memory": MEMORY,
        f"context {model.context:,}": CONTEXT,
    }


def header_html(loaded: Loaded | None, *, loading: str = "") -> str:
    """Show the name, what the checkpoint is, how it runs, and the warnings.

    Args:
        loaded: the model.
        loading: the name of one that is being loaded, where there is none yet.
    """
    if loaded is None:
        name = f"Loading {loading}" if loading else NO_MODEL
        words = "" if loading else "<p>Choose one in the Model tab; it is loaded at once.</p>"
        return f"<header><h1>{escape(name)}</h1>{_tools()}</header>{words}"
    model = loaded.model
    chips = "".join(_chip(fact, meaning) for fact, meaning in model_facts(model).items())
    warnings = dict.fromkeys((*model.warnings, *model.plan.warnings))
    notes = "".join(f"<p role='note'>{escape(warning)}</p>" for warning in warnings)
    template = f"{model.template.name} ({model.template.source})"
    why = f"<pre tabindex='0'>{escape(model.explain())}</pre>"
    name = escape(title(loaded))
    return (
        f"<header><h1 title='{name}'>{name}</h1><ul>{chips}</ul>{_tools()}</header>"
        f"<dl><dt>Kernel</dt><dd><details id='{elements.WHY}'><summary>"
        f"<span id='{elements.HEADLINE}'>"
        f"{escape(model.plan.headline())}</span> <b>Why?</b></summary>{why}</details></dd>"
        f"<dt>Template</dt><dd id='{elements.TEMPLATE}'>{escape(template)}</dd></dl>{notes}"
    )


def _tools() -> str:
    buttons = "".join(
        TOOL.format(name=name, label=label, title=title, icon=ICON.format(path))
        for name, label, title, path in TOOLS
    )
    return f"<nav aria-label='Page'>{buttons}</nav>"


def _chip(fact: str, meaning: str) -> str:
    return (
        f"<li><span tabindex='0'>{escape(fact)}"
        f"<span role='tooltip'>{escape(meaning[:1].upper() + meaning[1:])}</span></span></li>"
    )
