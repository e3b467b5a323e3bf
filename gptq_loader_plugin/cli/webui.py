"""The command that puts the loader into another program: webui install, uninstall, run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol, runtime_checkable

import typer

from gptq_loader_plugin.cli.output import reported, say

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["add_to"]

Folder = Annotated[
    Path | None,
    typer.Argument(
        metavar="DIR", help="text-generation-webui's folder; else WEBUI_DIR, else this folder."
    ),
]
FolderOption = Annotated[
    Path | None,
    typer.Option("--dir", help="text-generation-webui's folder; else WEBUI_DIR, else this one."),
]
Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="-- ARGS", help="text-generation-webui's own: -- --model NAME --api"),
]
# What this command sets for itself (`app.options`); the program it starts has its own ways.
OWN_SETTINGS = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}


@runtime_checkable
class _InFolder(Protocol):
    """A host that lives in a folder, beside what `Host` has."""

    def install(self, **options: object) -> object: ...

    def uninstall(self, *, folder: Path) -> Path | None: ...

    def command(self, *, folder: Path, arguments: Sequence[str]) -> list[str]: ...


def add_to(app: typer.Typer) -> None:
    """Add these commands to the application."""
    webui = typer.Typer(
        help="Load GPTQ checkpoints in text-generation-webui.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    webui.command()(reported(install))
    webui.command()(reported(uninstall))
    webui.command()(reported(run))
    app.add_typer(webui, name="webui")


def install(folder: Folder = None) -> None:
    """Put the extension gptq_loader into text-generation-webui's user_data."""
    where = _webui().install(folder=_folder(folder))
    say(
        f"installed into {where}\n"
        "start it with: gptq-loader webui run -- ARGS\n"
        "or add to your own way of starting it: --extensions gptq_loader"
    )


def uninstall(folder: Folder = None) -> None:
    """Take the extension out of text-generation-webui again."""
    removed = _webui().uninstall(folder=_folder(folder))
    say(f"removed {removed}" if removed else "it is not installed there")


def run(arguments: Arguments = None, *, folder: FolderOption = None) -> None:
    """Start text-generation-webui with the loader in it, so that --model can name a checkpoint."""
    command = _webui().command(folder=_folder(folder), arguments=arguments or [])
    environ = {k: v for k, v in os.environ.items() if OWN_SETTINGS.get(k) != v}
    if sys.platform == "win32":  # where a program cannot take another one's place
        raise typer.Exit(subprocess.call(command, env=environ))  # noqa: S603 - our own Python
    os.execve(command[0], command, environ)  # noqa: S606 - our own Python


def _folder(named: Path | None) -> Path:
    return named or Path(os.environ.get("WEBUI_DIR") or ".")


def _webui() -> _InFolder:
    from gptq_loader_plugin.errors import PluginError
    from gptq_loader_plugin.plugins import Plugins

    host = Plugins(installed=True).host("webui")
    if not isinstance(host, _InFolder):
        raise PluginError(
            "the plugin for text-generation-webui does not fit this command",
            hint="update gptq-loader-plugin and the plugin that offers the host webui",
        )
    return host
