"""The command that says which programs take a checkpoint: where."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.catalog.engines.engine import OURS
from gptq_loader_plugin.cli.options import JSON, Checkpoint
from gptq_loader_plugin.cli.output import print_json, print_table, reported, show, yes_no

if TYPE_CHECKING:
    from gptq_loader_plugin.catalog.engines.engine import Answer

__all__ = ["add_to"]

COLUMNS = ("Engine", "Version", "Takes it", "Why")


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Say which programs take a checkpoint, and why the others do not.")(
        reported(where)
    )


def where(
    reference: Checkpoint,
    *,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Say which programs take a checkpoint, and why the others do not, from its headers."""
    from gptq_loader_plugin.catalog.where import find_where
    from gptq_loader_plugin.plugins import Plugins

    answers = find_where(reference, revision=revision, plugins=Plugins(installed=True))
    if as_json:
        print_json([asdict(answer) for answer in answers])
        return
    hosts = [it.engine.partition("+")[2] for it in answers if it.engine.startswith(f"{OURS}+")]
    rows = [_row(answer) for answer in answers if not answer.engine.startswith(f"{OURS}+")]
    print_table(COLUMNS, rows)
    if hosts:
        show(f"{OURS} is in {', '.join(hosts)} as well, with the same answer")
    read = max(answer.date for answer in answers if answer.engine == "vllm")
    show(f"Rules of other programs as their code was on {read}; --json names where in it")


def _row(answer: Answer) -> tuple[str, ...]:
    return (answer.engine, answer.version, yes_no(answer.takes, unknown="?"), answer.reason)
