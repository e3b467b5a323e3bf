"""The command that says whether a checkpoint is right: verify."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.cli.options import JSON, Checkpoint, load_options
from gptq_loader_plugin.cli.output import ProgressBars, print_json, reported, show

if TYPE_CHECKING:
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.verify.report import Report

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Say whether a checkpoint is right; the exit code is 1 if not.")(
        reported(verify)
    )


@load_options("device", "backend", "dtype", "revision")
def verify(
    reference: Checkpoint,
    *,
    load: LoadOptions,
    hashes: Annotated[
        bool, typer.Option("--hash/--no-hash", help="Hash files of the hub's cache.")
    ] = True,
    split: Annotated[
        bool | None,
        typer.Option(
            "--split/--no-split",
            help="Load it over two devices as well, and compare.",
            show_default="where it is small, or there are two accelerators",
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            metavar="MODEL",
            help="Compare with the unquantised model: a folder, or a .gguf file.",
        ),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Say whether a checkpoint is right: its files, every layer, the kernels and its text."""
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.verify.run import verify as run

    bars = ProgressBars(quiet=as_json)
    try:
        report = run(
            reference,
            options=load,
            plugins=Plugins(bars, installed=True),
            hashes=hashes,
            split=split,
            against=against,
        )
    finally:
        bars.close()
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)
    if not report.right:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    show(report.line)
    for finding in report.findings:
        show(f"  {'wrong' if finding.wrong else 'note'}: {finding.check}: {finding.message}")
        if finding.fix:
            show(f"    {finding.fix}")
    for name, value in report.facts.items():
        if name not in ("replies", "reference"):
            show(f"  {name}: {value}")
    if compared := report.facts.get("reference"):
        show("  against the reference:")
        errors = {layer["name"]: layer for layer in compared["layers"]}
        for name, value in compared.items():
            if name not in ("layers", "worst", "not_compared"):
                show(f"    {name}: {value}")
        for name in compared.get("worst", ()):
            weight, output = errors[name]["weight"], errors[name]["output"]
            show(f"    {name}: weight {weight:.4f}, worst output {output:.4f}")
        if left := compared["not_compared"]:
            show(f"    not compared: {len(left)} layers, {left[0]} among them")
