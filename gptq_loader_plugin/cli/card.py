"""The command that writes a model card, and reads one: card."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.cli.options import JSON
from gptq_loader_plugin.cli.output import ProgressBars, print_json, reported, say, show

if TYPE_CHECKING:
    from gptq_loader_plugin.catalog.card_facts import CardFacts

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Write a model card from what the files show, or read one.")(
        reported(card)
    )


def card(
    references: Annotated[
        list[str],
        typer.Argument(metavar="REF...", help="A checkpoint, a repository, or several folders."),
    ],
    *,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write to this file; else it is printed.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="owner/repo of the model it was made of.")
    ] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="The licence, where no card says it.")
    ] = None,
    read: Annotated[
        bool, typer.Option("--read", help="Say what the card of now tells instead.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Write a model card from headers, sizes, engines' rules and kept figures, or read one.

    Of a repository, all branches are in it. What its card of now says of lineage is kept.
    """
    from gptq_loader_plugin.catalog.card_facts import gather_card_facts
    from gptq_loader_plugin.catalog.model_card import write_card
    from gptq_loader_plugin.device import find_device
    from gptq_loader_plugin.errors import OptionInvalid
    from gptq_loader_plugin.hub.hub_reference import parse_hub_reference
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.system.atomic_file import write_whole
    from gptq_loader_plugin.system.paths import local_path

    if out is not None and out.exists() and not read:
        raise OptionInvalid(f"{out} is there already", hint="name another file, or remove it first")
    first = references[0]
    is_here = local_path(first).exists()
    hub = None if is_here or ":" in first or read else parse_hub_reference(first)
    bars = ProgressBars()
    try:
        facts = gather_card_facts(
            references, plugins=Plugins(bars, installed=True), device=find_device(None),
            hub=hub if len(references) == 1 else None,
        )  # fmt: skip
    finally:
        bars.close()
    if read:
        _show_read(facts, as_json=as_json)
        return
    text = write_card(
        facts, perplexities=_perplexities(references), base_model=base_model,
        license_name=license_name,
    )  # fmt: skip
    if out is not None:
        write_whole(out, text)
        say(f"written: {out}")
    if as_json:
        print_json({**asdict(facts), "text": text})
    elif out is None:
        show(text.rstrip("\n"))


def _show_read(facts: CardFacts, *, as_json: bool) -> None:
    fields = asdict(facts.card)
    if as_json:
        print_json(fields)
        return
    for name, value in fields.items():
        text = ", ".join(value) if isinstance(value, tuple) else value
        show(f"{name.replace('_', ' '):<16} {text or '-'}")


def _perplexities(references: list[str]) -> list[tuple[str, str, float]]:
    """List the figures that are kept of these checkpoints."""
    from gptq_loader_plugin.measure.results import MeasuredFiles
    from gptq_loader_plugin.system.folders import data_folder

    kept, _ = MeasuredFiles(data_folder()).read()
    paths = {str(Path(it).resolve()) for it in references}
    return [
        (it.name, it.text.name, it.perplexity)
        for it in kept
        if it.path in paths or it.name in references
    ]
