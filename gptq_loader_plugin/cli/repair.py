"""The command that corrects a checkpoint's small files: repair."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.cli.options import JSON, Checkpoint
from gptq_loader_plugin.cli.output import ProgressBars, print_json, reported, say, show

if TYPE_CHECKING:
    from gptq_loader_plugin.repair import Repair

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Write what is missing in a checkpoint's small files, or lies.")(
        reported(repair)
    )


def repair(
    reference: Checkpoint,
    *,
    sibling: Annotated[
        str | None,
        typer.Option("--from", help="The model it was made of, or a sibling: copy from there."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Write without asking.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the difference alone.")] = False,
    as_json: JSON = False,
) -> None:
    """Write what is missing in a checkpoint's small files, or lies: configs, index, tokenizer.

    The difference is shown first. What was there is kept beside it; weights are not touched.
    """
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.reference import resolve
    from gptq_loader_plugin.repair import apply_changes, plan_repair

    bars = ProgressBars()
    try:
        plugins = Plugins(bars, installed=True)
        path = resolve(reference, plugins=plugins)
        other = resolve(sibling, plugins=plugins) if sibling else None
    finally:
        bars.close()
    folder = path if path.is_dir() else path.parent
    planned = plan_repair(
        folder, sibling=other if other is None or other.is_dir() else other.parent
    )
    diff = "".join(change.diff() for change in planned.changes)
    if not as_json:
        _show(planned, diff)
    written = bool(planned.changes) and not dry_run and (yes or _confirmed(as_json=as_json))
    kept = apply_changes(planned.changes) if written else []
    if as_json:
        print_json(
            {
                "reference": reference,
                "path": str(folder),
                "changes": [{"file": str(it.file), "why": it.why} for it in planned.changes],
                "diff": diff,
                "written": written,
                "backups": [str(it) for it in kept],
                "notes": list(planned.notes),
            }
        )
        return
    if not planned.changes:
        say("nothing to correct")
    elif written:
        say(f"written; what was there is in {', '.join(it.name for it in kept) or 'no file'}")
    else:
        say("nothing was written")


def _show(planned: Repair, diff: str) -> None:
    if diff:
        show(diff.rstrip("\n"))
    for change in planned.changes:
        say(f"{change.file.name}: {change.why}")
    for note in planned.notes:
        say(f"note: {note}")


def _confirmed(*, as_json: bool) -> bool:
    """Ask whether to write.

    Raises:
        OptionInvalid: nobody can be asked.
    """
    from gptq_loader_plugin.errors import OptionInvalid

    if as_json or not sys.stdin.isatty():
        raise OptionInvalid(
            "nothing was written: nobody can be asked here",
            hint="add --yes to write it, or --dry-run to see it alone",
        )
    return typer.confirm("Write this?", err=True)
