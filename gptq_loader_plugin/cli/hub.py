"""Commands about where checkpoints are: branches, download, models."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated

import typer

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
    from gptq_loader_plugin.catalog.local import LocalReport
    from gptq_loader_plugin.hub import Downloading
    from gptq_loader_plugin.hub.hub_reference import HubReference

__all__ = ["add_to"]

JSON = Annotated[bool, typer.Option("--json", help="Write the result as JSON.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Where it is to fit: cpu, cuda, cuda:1; else the best here."),
]
Context = Annotated[
    int, typer.Option("--context", min=1, help="Tokens of context to keep room for.")
]
BRANCH_COLUMNS = (
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
    "Desc",
)
MODEL_COLUMNS = ("Model", "Bits", "GS", "Act Order", "Layers", "Size", "Fits", "Where")


def add_to(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command(short_help="List a repository's branches, and which fit this machine.")(
        reported(branches)
    )
    app.command(short_help="Fetch a branch from the hub, every hash checked.")(reported(download))
    app.command(short_help="List the checkpoints on this machine.")(reported(models))


def branches(
    reference: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the hub.")],
    *,
    device: Device = None,
    context: Context = 4096,
    as_json: JSON = False,
) -> None:
    """List a repository's branches as its card does, and which fit this machine."""
    from gptq_loader_plugin.catalog.branches import list_branches
    from gptq_loader_plugin.device import find_device
    from gptq_loader_plugin.plugins import Plugins

    hub = _on_hub(reference)
    bars = ProgressBars()
    plugins = Plugins(bars, installed=True)
    try:
        report = list_branches(
            hub,
            device=find_device(device),
            kernels=plugins.kernels(),
            context=context,
            alone=":" in reference,
            progress=plugins.progress,
        )
    finally:
        bars.close()
    if as_json:
        print_json(report.to_json())
    else:
        _show(report)


def download(
    reference: Annotated[str, typer.Argument(metavar="REPO[:BRANCH]", help="On the hub.")],
    *,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--to", help="Put the files into this folder, not the cache.")
    ] = None,
    to_models: Annotated[
        bool,
        typer.Option(
            "--to-models", help="Put them into the models directory, as owner_repo_branch."
        ),
    ] = False,
    as_json: JSON = False,
) -> None:
    """Fetch a branch from the hub, every hash checked; an interrupted download goes on."""
    from gptq_loader_plugin.hub import download as fetch
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.reference import models_folders

    hub = _on_hub(reference, revision=revision)
    if to is None and to_models:
        to = models_folders()[0] / hub.folder_name
    told: list[Downloading] = []

    def announce(coming: Downloading) -> None:
        told.append(coming)
        _announce(hub, coming)

    bars = ProgressBars()
    try:
        plugins = Plugins(bars, installed=True)
        folder = fetch(hub, to=to, progress=plugins.progress, announced=announce)
    finally:
        bars.close()
    if not as_json:
        typer.echo(folder)
        return
    branch = told[0].branch
    print_json(
        {
            "reference": reference,
            "path": str(folder),
            "commit": branch.commit,
            "license": branch.license,
            "size_bytes": branch.size,
            "fetched_bytes": told[0].missing,
        }
    )


def models(*, device: Device = None, context: Context = 4096, as_json: JSON = False) -> None:
    """List the checkpoints on this machine: of the models directories and the hub's cache."""
    from gptq_loader_plugin.catalog.local import local_models, report_model
    from gptq_loader_plugin.device import find_device
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.reference import models_folders

    where, kernels = find_device(device), Plugins(installed=True).kernels()
    reports = [report_model(it, where, kernels, context=context) for it in local_models()]
    if as_json:
        print_json([it.to_json() for it in reports])
        return
    if not reports:
        folders = ", ".join(str(it) for it in models_folders())
        say(f"there is no checkpoint in {folders}, nor in the Hugging Face cache")
        say("fetch one: gptq-loader download owner/repo:branch; or try gptq-loader demo")
        return
    print_table(MODEL_COLUMNS, [_model_row(it) for it in reports])
    show(f"Fits {where} with {context:,} tokens of context")
    for it in reports:
        if it.error:
            say(f"{it.model.name} is damaged: {it.error}\n  hint: {it.hint}")
        elif not it.fit.fits:
            show(f"  {it.model.name}: {yes_no(it.fit.fits, unknown='?')}: {it.fit.reason}")


def _model_row(it: LocalReport) -> tuple[str, ...]:
    return (
        it.model.name,
        text_of(it.bits),
        group_text(it.group_size),
        yes_no(it.desc_act),
        text_of(it.layers),
        write_size(it.model.size_bytes),
        "damaged" if it.error else yes_no(it.fit.fits, unknown="?"),
        it.model.source,
    )


def _on_hub(reference: str, *, revision: str | None = None) -> HubReference:
    from gptq_loader_plugin.errors import OptionInvalid
    from gptq_loader_plugin.hub.hub_reference import parse_hub_reference

    hub = parse_hub_reference(reference, revision=revision)
    if hub is None:
        raise OptionInvalid(
            f"{reference} names nothing on the hub",
            hint="write owner/repo, or owner/repo:branch",
        )
    return hub


def _show(report: RepoReport) -> None:
    from gptq_loader_plugin.hub.words import hub_name

    gated = "; gated: its owner lets people in" if report.gated else ""
    show(f"{report.repo} on {hub_name()}, licence {report.license or 'not given'}{gated}")
    print_table(BRANCH_COLUMNS, [_branch_row(it) for it in report.branches])
    show(
        f"Fits {report.device} with {report.context:,} tokens of context; "
        f"{write_size(report.free_bytes)} of disk free"
    )
    for it in report.branches:
        if it.error:
            show(f"  {it.branch}: {'not GPTQ' if it.is_gptq is False else 'not read'}: {it.error}")
        else:
            exllama = it.exllama
            slow = f"; ExLlama: {exllama.reason}" if exllama and not exllama.compatible else ""
            show(f"  {it.branch}: {yes_no(it.fit.fits, unknown='?')}: {it.fit.reason}{slow}")
    for it in report.branches:
        for warning in it.warnings:
            say(f"warning: {it.branch}: {warning}")
    for warning in report.warnings:
        say(f"warning: {warning}")


def _branch_row(it: BranchReport) -> tuple[str, ...]:
    return (
        it.branch,
        text_of(it.bits),
        group_text(it.group_size),
        yes_no(it.desc_act),
        text_of(it.damp_percent),
        text_of(it.dataset),
        text_of(it.seq_len),
        "-" if it.size_bytes is None else write_size(it.size_bytes),
        yes_no(it.exllama.compatible if it.exllama else None),
        "-" if it.is_gptq is False else yes_no(it.fit.fits, unknown="?"),
        "not GPTQ"
        if it.is_gptq is False
        else (it.desc or "") + ("" if not it.here else " (here)" if it.desc else "here"),
    )


def _announce(hub: HubReference, coming: Downloading) -> None:
    from gptq_loader_plugin.hub.words import hub_name

    branch = coming.branch
    say(f"{hub} from {hub_name()}, commit {branch.commit[:8]}")
    say(f"licence: {branch.license or 'its model card gives none'}")
    if not coming.missing:
        say(f"all {len(branch.files)} files are here ({write_size(branch.size)})")
        return
    here = branch.size - coming.missing
    say(
        f"{len(branch.files)} files, {write_size(branch.size)}"
        + (f", of which {write_size(here)} are here" if here else "")
        + f"; {write_size(coming.free)} of disk free"
    )
