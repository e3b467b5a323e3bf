"""The command that looks for what goes wrong, on the machine or with a checkpoint: doctor."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gptq_loader_plugin.cli.options import JSON, load_options
from gptq_loader_plugin.cli.output import ProgressBars, print_json, reported, show
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.verify.report import Symptom

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Find what goes wrong here, or the cause of a symptom.")(
        reported(doctor)
    )


@load_options("device", "backend", "dtype", "template", "revision", "context")
def doctor(
    reference: Annotated[
        str | None, typer.Argument(metavar="REF", help="A checkpoint that has a symptom.")
    ] = None,
    *,
    load: LoadOptions,
    symptom: Annotated[
        Symptom | None, typer.Option("--symptom", help="What you see of the checkpoint.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Find what goes wrong on this machine; with a checkpoint, the cause of a symptom."""
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.verify.machine import diagnose_machine
    from gptq_loader_plugin.verify.symptoms import diagnose

    if (reference is None) != (symptom is None):
        raise OptionInvalid(
            "a symptom belongs to a checkpoint, and a checkpoint to a symptom",
            hint="gptq-loader doctor REF --symptom gibberish; or neither, for the machine",
        )
    if reference is None or symptom is None:
        diagnoses = diagnose_machine(folder=Path.cwd(), environ=os.environ)
    else:
        bars = ProgressBars(quiet=as_json)
        try:
            plugins = Plugins(bars, installed=True)
            diagnoses = diagnose(reference, symptom, options=load, plugins=plugins)
        finally:
            bars.close()
    if as_json:
        print_json([asdict(diagnosis) for diagnosis in diagnoses])
        return
    for diagnosis in diagnoses:
        show(f"{diagnosis.cause}\n  seen: {diagnosis.evidence}\n  do:   {diagnosis.fix}")
    if not diagnoses:
        show("nothing was found that explains it" if symptom else "nothing was found")
