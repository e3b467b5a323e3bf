"""The command's options that every subcommand shares, and its entry point."""

from __future__ import annotations

import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from gptq_loader_plugin.cli import bench, chat, hosts, hub, inspect, quantize, serve, tune
from gptq_loader_plugin.cli.output import say

__all__ = ["app", "run"]

app = typer.Typer(
    name="gptq-loader",
    help="Load any GPTQ checkpoint, exactly, and say which kernel runs it and why.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for commands in (chat, serve, inspect, hub, quantize, bench, tune, hosts):
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


def run() -> None:
    """Run the command, whatever its streams are: closed, full, or of few letters."""
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the end
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except OSError as error:  # of typer's own: help, usage, the version; commands say theirs
        say(f"error: {error.strerror or error}\nhint: check where the output goes")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
