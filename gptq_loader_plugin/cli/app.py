"""The command's options that every subcommand shares, and its entry point."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.cli import (
    bench,
    branches,
    card,
    chat,
    compare,
    convert,
    demo,
    doctor,
    download,
    explain,
    forecast,
    generate,
    inspect,
    models,
    perplexity,
    plugins,
    quantize,
    repair,
    sample,
    serve,
    tune,
    verify,
    webui,
    where,
)
from gptq_loader_plugin.cli.output import reported, say
from gptq_loader_plugin.errors import GPTQLoaderError, PluginError
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["add_plugin_commands", "app", "run"]

app = typer.Typer(
    name="gptq-loader",
    help="Load any GPTQ checkpoint, exactly, and say which kernel runs it and why.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    demo,
    chat,
    generate,
    serve,
    inspect,
    explain,
    where,
    forecast,
    verify,
    doctor,
    plugins,
    branches,
    card,
    download,
    models,
    quantize,
    convert,
    repair,
    perplexity,
    compare,
    sample,
    bench,
    tune,
    webui,
):
    command.add_to(app)


BUILT_IN = frozenset(
    registered_command.name or getattr(registered_command.callback, "__name__", "")
    for registered_command in app.registered_commands
) | {registered_group.name for registered_group in app.registered_groups}


def add_plugin_commands(arguments: Sequence[str], plugins: Callable[[], Plugins]) -> None:
    """Add the commands of plugins, unless a built-in one is called: finding plugins takes time.

    Where one fails, the commands of all plugins are left out, with a warning.

    Args:
        arguments: those of the command line.
        plugins: finds the plugins in force.
    """
    called = next((argument for argument in arguments if not argument.startswith("-")), None)
    if called in BUILT_IN:
        return
    before = len(app.registered_commands), len(app.registered_groups)
    try:
        plugins().hook.gptq_commands(app=app)
        _check_names(app)
    except GPTQLoaderError as error:
        del app.registered_commands[before[0] :], app.registered_groups[before[1] :]
        say(f"warning: {error.message}\nhint: {error.hint}")
        return
    for command in app.registered_commands[before[0] :]:
        if command.callback is not None:
            command.callback = reported(command.callback)
    for group in app.registered_groups[before[1] :]:
        for command in group.typer_instance.registered_commands if group.typer_instance else ():
            if command.callback is not None:
                command.callback = reported(command.callback)


def _check_names(app: typer.Typer) -> None:
    """Refuse two commands of one name, of which typer would run the last.

    Raises:
        PluginError: a plugin's command has the name of another one.
    """
    names = Counter(
        registered_command.name
        or getattr(registered_command.callback, "__name__", "").replace("_", "-")
        for registered_command in app.registered_commands
    )
    names.update(registered_group.name or "" for registered_group in app.registered_groups)
    if taken := sorted(name for name, count in names.items() if count > 1):
        raise PluginError(
            f"a plugin adds the command {taken[0]!r}, which is there already",
            hint="find it with gptq-loader plugins; leave it out with GPTQ_LOADER_PLUGINS",
        )


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
    add_plugin_commands(sys.argv[1:], lambda: Plugins(installed=True))
    try:
        app()
    except OSError as error:  # of typer's own: help, usage, the version; commands say theirs
        say(f"error: {error.strerror or error}\nhint: check where the output goes")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
