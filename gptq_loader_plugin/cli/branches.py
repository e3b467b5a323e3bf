"""The command that lists a repository's branches: branches."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.catalog.engines.engine import engines_of
from gptq_loader_plugin.cli.options import JSON, FitContext, FitDevice, hub_reference
from gptq_loader_plugin.cli.output import (
    ProgressBars,
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
    from gptq_loader_plugin.catalog.branches import BranchReport, RepoReport
    from gptq_loader_plugin.device import Device

__all__ = ["add_to"]

COLUMNS = (
    "Branch",
    "Bits",
    "GS",
    "Act Order",
    "Damp %",
    "GPTQ Dataset",
    "Seq Len",
    "Size",
    "ExLlama",
    "Fits",
    "Runs in",
    "Desc",
)


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="List a repository's branches, and which fit this machine.")(
        reported(branches)
    )


def branches(
    reference: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub.")],
    *,
    device: FitDevice = None,
    context: FitContext = 4096,
    vram: Annotated[
        float | None,
        typer.Option("--vram", min=0.1, help="GiB of a GPU to choose a branch for, here or not."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """List a repository's branches as its card does, and which fit this machine."""
    from gptq_loader_plugin.catalog.branches import list_branches
    from gptq_loader_plugin.catalog.recommend import recommend
    from gptq_loader_plugin.device import find_device
    from gptq_loader_plugin.plugins import Plugins

    hub = hub_reference(reference)
    bars = ProgressBars()
    plugins = Plugins(bars, installed=True)
    try:
        report = list_branches(
            hub,
            device=find_device(device) if vram is None else _gpu(device, vram),
            kernels=plugins.kernels(),
            context=context,
            alone=":" in reference,
            progress=plugins.progress,
        )
    finally:
        bars.close()
    recommended = recommend(report)
    if as_json:
        print_json({**report.to_json(), "recommendation": asdict(recommended)})
        return
    _show(report)
    if recommended.branch is None:
        show(f"Recommended: none. {recommended.reason}")
    else:
        show(f"Recommended: {recommended.branch}. {recommended.reason}")


def _gpu(device: str | None, gibibytes: float) -> Device:
    """Describe a GPU of so much memory, which need not be here."""
    from gptq_loader_plugin.device import find_device

    return replace(find_device(device or "cuda:sm86"), memory_bytes=int(gibibytes * (1 << 30)))


def _show(report: RepoReport) -> None:
    from gptq_loader_plugin.hub.error_messages import hub_name

    gated = "; gated: its owner lets people in" if report.gated else ""
    show(f"{report.repo} on {hub_name()}, licence {report.license or 'not given'}{gated}")
    print_table(COLUMNS, [_row(branch) for branch in report.branches])
    show(
        f"Fits {report.device} with {report.context:,} tokens of context; "
        f"{write_size(report.free_bytes)} of disk free"
    )
    for branch in report.branches:
        if branch.error:
            problem = "not GPTQ" if branch.is_gptq is False else "not read"
            show(f"  {branch.branch}: {problem}: {branch.error}")
        else:
            exllama = branch.exllama
            slow = (
                f"; ExLlama: {exllama.reason}" if exllama and exllama.compatible is not True else ""
            )
            fits = yes_no(branch.fit.fits, unknown="?")
            show(f"  {branch.branch}: {fits}: {branch.fit.reason}{slow}")
    for branch in report.branches:
        for warning in branch.warnings:
            say(f"warning: {branch.branch}: {warning}")
    for warning in report.warnings:
        say(f"warning: {warning}")


def _row(report: BranchReport) -> tuple[str, ...]:
    return (
        report.branch,
        text_of(report.bits),
        group_text(report.group_size),
        yes_no(report.desc_act),
        text_of(report.damp_percent),
        text_of(report.dataset),
        text_of(report.seq_len),
        "-" if report.size_bytes is None else write_size(report.size_bytes),
        yes_no(report.exllama.compatible, unknown="perhaps") if report.exllama else "-",
        "-" if report.is_gptq is False else yes_no(report.fit.fits, unknown="?"),
        engines_of(report.engines) if report.engines else "-",
        "not GPTQ"
        if report.is_gptq is False
        else (report.desc or "")
        + ("" if not report.here else " (here)" if report.desc else "here"),
    )
