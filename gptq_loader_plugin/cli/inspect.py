"""The command that says what a checkpoint is: inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
from gptq_loader_plugin.errors import GPTQLoaderError
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
        list[str], typer.Argument(metavar="REF", help="A checkpoint; several make a table.")
    ],
    *,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Say what a checkpoint is, from its headers, and where each fact came from."""
    import gptq_loader_plugin as gptq

    if len(references) == 1:
        report = gptq.inspect(references[0], revision=revision)
        if as_json:
            print_json(report.to_json())
        else:
            _show(report)
        return
    reports = [(reference, _report(reference, revision)) for reference in references]
    if as_json:
        print_json([_to_json(reference, report) for reference, report in reports])
    else:
        _table(reports)
    if any(isinstance(report, GPTQLoaderError) for _, report in reports):
        raise typer.Exit(1)


def _report(reference: str, revision: str | None) -> CheckpointReport | GPTQLoaderError:
    """Return what a checkpoint is, or what is wrong with it."""
    import gptq_loader_plugin as gptq

    try:
        return gptq.inspect(reference, revision=revision)
    except GPTQLoaderError as error:
        return error


def _to_json(reference: str, report: CheckpointReport | GPTQLoaderError) -> dict[str, Any]:
    if isinstance(report, GPTQLoaderError):
        return {"reference": reference, "error": report.message, "hint": report.hint}
    return report.to_json()


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


def _table(reports: list[tuple[str, CheckpointReport | GPTQLoaderError]]) -> None:
    print_table(COLUMNS, [_row(reference, report) for reference, report in reports])
    for reference, report in reports:
        if isinstance(report, GPTQLoaderError):
            say(f"error: {reference}: {report.message}\nhint: {report.hint}")
            continue
        for warning in report.warnings:
            say(f"warning: {report.reference}: {warning}")


def _row(reference: str, report: CheckpointReport | GPTQLoaderError) -> tuple[str, ...]:
    name = reference.rstrip("/").rpartition("/")[2].rpartition(":")[2]
    if isinstance(report, GPTQLoaderError):
        return (name, "damaged", *["-"] * (len(COLUMNS) - 2))
    return (
        name,
        str(report.bits),
        group_text(report.group_size),
        yes_no(report.desc_act),
        text_of(report.damp_percent),
        write_size(report.size_bytes),
        str(report.quantized_layers),
        yes_no(report.exllama.compatible),
        report.template.name,
    )
