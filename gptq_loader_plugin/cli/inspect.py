"""Commands that report: inspect, explain, plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import typer

from gptq_loader_plugin.cli.options import DeviceMap, MaxMemory
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
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.planning.placement import read_limits
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.catalog.report import CheckpointReport

__all__ = ["add_to"]

JSON = Annotated[bool, typer.Option("--json", help="Write the result as JSON.")]
Revision = Annotated[
    str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")
]
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


class _Explained(Protocol):
    """What an engine says of a checkpoint."""

    def explain(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...


@runtime_checkable
class _Explaining(Protocol):
    """An engine that can say what it would run, beside what `Engine` has."""

    def explain(
        self, reference: str, *, device: str | None, backend: str | None, revision: str | None
    ) -> _Explained: ...


def add_to(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command(short_help="Say what a checkpoint is, without reading its weights.")(
        reported(inspect)
    )
    app.command(short_help="Say which kernel would run each layer, and why.")(reported(explain))
    app.command(short_help="List what is installed, and whether it works here.")(reported(plugins))


def inspect(
    references: Annotated[
        list[str], typer.Argument(metavar="REF...", help="A checkpoint; several make a table.")
    ],
    *,
    revision: Revision = None,
    as_json: JSON = False,
) -> None:
    """Say what a checkpoint is, from its headers, and where each fact came from."""
    import gptq_loader_plugin as gptq

    reports = [gptq.inspect(it, revision=revision) for it in references]
    if as_json:
        data = [report.to_json() for report in reports]
        print_json(data[0] if len(data) == 1 else data)
    elif len(reports) == 1:
        _show(reports[0])
    else:
        _table(reports)


def explain(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A checkpoint.")],
    *,
    device: Annotated[
        str | None,
        typer.Option("--device", help="cpu, cuda, cuda:1, or one not here: cuda:sm86."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="Ask about one kernel by name.")
    ] = None,
    revision: Revision = None,
    device_map: DeviceMap = None,
    max_memory: MaxMemory = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="Explain what runs inside another engine: vllm."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Say which kernel would run each layer, and why not the others, without reading weights."""
    import gptq_loader_plugin as gptq

    if engine is not None:
        if device_map or max_memory:
            raise OptionInvalid(
                f"a device map is not for {engine}, which divides a model in its own way",
                hint="leave out --device-map and --max-memory",
            )
        explaining = _engine(engine)
        explained = explaining.explain(reference, device=device, backend=backend, revision=revision)
        _show_plan(explained, as_json=as_json)
        return
    plan = gptq.explain(
        reference,
        device=device,
        backend=backend,
        revision=revision,
        device_map=device_map,
        max_memory=read_limits(max_memory),
    )
    _show_plan(plan, as_json=as_json)


def _engine(name: str) -> _Explaining:
    """Find an engine that can say what it would run.

    Raises:
        OptionInvalid: there is none of that name.
    """
    from gptq_loader_plugin.plugins import Plugins

    found = {it.name: it for it in Plugins(installed=True).hosts() if isinstance(it, _Explaining)}
    if name not in found:
        raise OptionInvalid(
            f"no engine {name!r} can say what it would run",
            hint=f"name {' or '.join(sorted(found))}, or leave out --engine",
        )
    return found[name]


def _show_plan(plan: _Explained, *, as_json: bool) -> None:
    if as_json:
        print_json(plan.to_json())
    else:
        show(plan.explain())


def plugins(*, as_json: JSON = False) -> None:
    """List kernels, templates, readers, hosts and plugins: what works here, and if not why."""
    from gptq_loader_plugin.plugins.discovery import discover, to_json, write_plugins

    found = discover()
    if as_json:
        print_json(to_json(found))
    else:
        show(write_plugins(found))
    broken = [it.name for it in found if it.state == "broken"]
    if broken:
        others = ",".join(it.name for it in found if it.state == "in force")
        say(
            f"warning: {', '.join(broken)} stands in the way of every load\n"
            f"hint: update or uninstall it, or leave it out: GPTQ_LOADER_PLUGINS={others}"
        )


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
    """Give a row for what the config tells of the calibration, which few do."""
    length = f"samples of {report.seq_len:,} tokens" if report.seq_len else ""
    words = ", ".join(it for it in (report.dataset or "", length) if it)
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
