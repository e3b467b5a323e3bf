"""The command that fetches a branch from the hub: download."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.cli.options import JSON, hub_reference
from gptq_loader_plugin.cli.output import (
    ProgressBars,
    print_json,
    reported,
    say,
)
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.hub import Downloading
    from gptq_loader_plugin.hub.hub_reference import HubReference

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Fetch a branch from the hub, every hash checked.")(reported(download))


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

    hub = hub_reference(reference, revision=revision)
    if to is None and to_models:
        to = models_folders()[0] / hub.folder_name
    started: list[Downloading] = []

    def announce(coming: Downloading) -> None:
        started.append(coming)
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
    branch = started[0].branch
    print_json(
        {
            "reference": reference,
            "path": str(folder),
            "commit": branch.commit,
            "license": branch.license,
            "size_bytes": branch.size,
            "fetched_bytes": started[0].missing,
        }
    )


def _announce(hub: HubReference, coming: Downloading) -> None:
    from gptq_loader_plugin.hub.error_messages import hub_name

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
