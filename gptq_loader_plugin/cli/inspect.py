"""The command that says what a checkpoint is: inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.cli.options import JSON
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
    from gptq_loader_plugin.catalog.report import CheckpointReport

__all__ = ["add_to"]

COLUMNS = (
    "Branch",
    "Bits",
    "Group",
    "Act order",
    "Damp %",
    "Size",
    "Layers",
    "ExLlama",
    "Template",
)


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Say what a checkpoint is, without reading its weights.")(
        reported(inspect)
    )


def inspect(
    references: Annotated[
        list[str], typer.Argument(metavar="REF...", help="A checkpoint; several make a table.")
    ],
    *,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Say what a checkpoint is, from its headers, and where each fact came from."""
    import gptq_loader_plugin as gptq

    reports = [gptq.inspect(reference, revision=revision) for reference in references]
    if as_json:
        data = [report.to_json() for report in reports]
        print_json(data[0] if len(data) == 1 else data)
    elif len(reports) == 1:
        _show(reports[0])
    else:
        _table(reports)


def _show(report: CheckpointReport) -> None:
    exllama = "yes" if report.exllama.compatible else f"no: {report.exllama.reason}"
    stop = ", ".join(report.template.stop)
    damp = "not recorded" if report.damp_percent is None else str(report.damp_percent)
    rows = [
        ("model", report.model_type, ""),
        ("bits", str(report.bits), "bits"),
        ("group size", group_text(report.group_size), "group_size"),
        ("act-order", yes_no(report.desc_act), "desc_act"),
        ("symmetric", yes_no(report.sym), "sym"),
        ("damp", damp, "damp_percent"),
        *_calibration(report),
        ("format", f"{report.checkpoint_format}, zeros {report.zeros}", "checkpoint_format"),
        ("size", write_size(report.size_bytes), ""),
        ("quantised layers", str(report.quantized_layers), ""),
        ("ExLlama", exllama, ""),
        ("template", f"{report.template.name}: {report.template.source}", ""),
        ("a reply stops at", stop or "the tokenizer's end token", ""),
    ]
    show(str(report.path))
    for label, value, field in rows:
        source = report.sources.get(field)
        show(f"  {label:<17} {value}{f'  ({source})' if source else ''}")
    for warning in report.warnings:
        say(f"warning: {warning}")


def _calibration(report: CheckpointReport) -> list[tuple[str, str, str]]:
    """Return a row for what the config tells of the calibration, which few do."""
    length = f"samples of {report.seq_len:,} tokens" if report.seq_len else ""
    words = ", ".join(word for word in (report.dataset or "", length) if word)
    return [("calibration", words, "dataset")] if words else []


def _table(reports: list[CheckpointReport]) -> None:
    rows = [
        (
            report.reference.rstrip("/").rpartition("/")[2].rpartition(":")[2],
            str(report.bits),
            group_text(report.group_size),
            yes_no(report.desc_act),
            text_of(report.damp_percent),
            write_size(report.size_bytes),
            str(report.quantized_layers),
            yes_no(report.exllama.compatible),
            report.template.name,
        )
        for report in reports
    ]
    print_table(COLUMNS, rows)
    for report in reports:
        for warning in report.warnings:
            say(f"warning: {report.reference}: {warning}")
