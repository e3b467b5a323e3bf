"""The command's options that every subcommand shares, and its entry point."""

from __future__ import annotations

import logging
import os
from typing import Annotated

import typer

from gptq_loader_plugin.cli import benching, checkpoints, hub, making, serving, talking, tuning

__all__ = ["app", "main"]

app = typer.Typer(
    name="gptq-loader",
    help="Load any GPTQ checkpoint, exactly, and say which kernel runs it and why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for commands in (talking, serving, checkpoints, hub, making, benching, tuning):
    commands.add_to(app)


def _version(value: bool) -> None:  # noqa: FBT001 - typer's callback
    if value:
        from importlib.metadata import version

        typer.echo(f"gptq-loader {version('gptq-loader-plugin')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and log lines.")] = False,
    version: Annotated[  # noqa: ARG001 - the callback acts on it
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Load any GPTQ checkpoint, exactly, and say which kernel runs it and why."""
    if debug:
        os.environ["GPTQ_LOADER_DEBUG"] = "1"
        logging.basicConfig(level=logging.INFO)
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars, beside our own


def main() -> None:
    """Run the command."""
    app()
