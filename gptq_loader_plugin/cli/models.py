"""The command that lists the checkpoints on this machine: models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.cli.options import JSON, FitContext, FitDevice
from gptq_loader_plugin.cli.output import (
    group_text,
    print_json,
    print_table,
    reported,
    say,
    show,
    text_of,
    yes_no,
)
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    import typer

    from gptq_loader_plugin.catalog.local import LocalModel, LocalReport

__all__ = ["add_to"]

COLUMNS = ("Model", "Bits", "GS", "Act Order", "Layers", "Size", "Fits", "Where")


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="List the checkpoints on this machine.")(reported(models))


def models(*, device: FitDevice = None, context: FitContext = 4096, as_json: JSON = False) -> None:
    """List the checkpoints on this machine: of the models directories and the hub's cache."""
    from gptq_loader_plugin.catalog.local import local_models, report_model
    from gptq_loader_plugin.device import find_device
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.reference import models_folders

    where, kernels = find_device(device), Plugins(installed=True).kernels()
    listed = [*_demo(), *local_models()]
    reports = [report_model(model, where, kernels, context=context) for model in listed]
    if as_json:
        print_json([report.to_json() for report in reports])
        return
    if not reports:
        folders = ", ".join(str(models_folder) for models_folder in models_folders())
        say(f"there is no checkpoint in {folders}, nor in the Hugging Face cache")
        say("fetch one: gptq-loader download owner/repo:branch; or try gptq-loader demo")
        return
    print_table(COLUMNS, [_row(report) for report in reports])
    show(f"Fits {where} with {context:,} tokens of context")
    for report in reports:
        if report.error:
            say(f"{report.model.name} is damaged: {report.error}\n  hint: {report.hint}")
        elif not report.fit.fits:
            fits = yes_no(report.fit.fits, unknown="?")
            show(f"  {report.model.name}: {fits}: {report.fit.reason}")


def _demo() -> list[LocalModel]:
    """Return the demo's checkpoint, where it was made."""
    from gptq_loader_plugin.catalog.local import LocalModel
    from gptq_loader_plugin.checkpoint.weight_files import KEPT
    from gptq_loader_plugin.quantize.demo import demo_folder

    folder = demo_folder()
    if not (folder / "config.json").is_file() or (folder / KEPT).exists():
        return []
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return [LocalModel("demo", folder, "demo", size)]


def _row(report: LocalReport) -> tuple[str, ...]:
    return (
        report.model.name,
        text_of(report.bits),
        group_text(report.group_size),
        yes_no(report.desc_act),
        text_of(report.layers),
        write_size(report.model.size_bytes),
        "damaged" if report.error else yes_no(report.fit.fits, unknown="?"),
        report.model.source,
    )
