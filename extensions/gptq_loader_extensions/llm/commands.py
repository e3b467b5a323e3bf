"""The commands `llm gptq list | add | remove | explain`."""

# Where the host is not installed, pyright takes this package for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, ParamSpec

import click

from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.system.paths import local_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_extensions.llm.listing import Listed

__all__ = ["gptq"]

P = ParamSpec("P")


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Turn our errors into click's, with the hint."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except GPTQLoaderError as error:
            raise click.ClickException(f"{error.message}\nhint: {error.hint}") from error

    return run


@click.group(name="gptq")
def gptq() -> None:
    """List, add and explain GPTQ checkpoints, which answer as gptq/NAME."""


@gptq.command(name="list")
@click.option("as_json", "--json", is_flag=True, help="Write the list as JSON.")
@reported
def list_(*, as_json: bool) -> None:
    """List the checkpoints of this machine, and where each one was found."""
    models = _models()
    if as_json:
        rows = [
            {"model_id": f"gptq/{it.name}", "reference": it.reference, "source": it.source}
            for it in models
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    width = max((len(it.name) for it in models), default=0)
    for it in models:
        click.echo(f"gptq/{it.name:<{width}}  {it.source}: {it.reference}")
    if not models:
        click.echo("none; add one: llm gptq add REF", err=True)


@gptq.command()
@click.argument("reference", metavar="REF")
@click.option("--name", help="What to call it: gptq/NAME; else what it is called anyway.")
@reported
def add(reference: str, name: str | None) -> None:
    """Add a checkpoint: a folder, a file, or owner/repo:branch, which is downloaded."""
    import llm

    from gptq_loader_extensions.llm.listing import added, write_added

    kept, name = _checked(reference, name)
    models = added(llm.user_dir())
    if models.get(name, kept) != kept:
        raise OptionInvalid(
            f"gptq/{name} is {models[name]} already",
            hint="choose another name with --name, or remove that one: llm gptq remove",
        )
    write_added(llm.user_dir(), {**models, name: kept})
    click.echo(f"added; ask it: llm -m {_quoted(f'gptq/{name}')} 'Hello'")


@gptq.command()
@click.argument("name", metavar="NAME")
@reported
def remove(name: str) -> None:
    """Take a name off the list again; the checkpoint's files stay."""
    import llm

    from gptq_loader_extensions.llm.listing import PREFIX, added, write_added

    models = added(llm.user_dir())
    name = name.removeprefix(PREFIX)
    if name not in models:
        raise OptionInvalid(
            f"gptq/{name} was not added",
            hint="only what llm gptq list calls added can be removed; the rest is found on the "
            "disk, and goes with its folder",
        )
    del models[name]
    write_added(llm.user_dir(), models)
    click.echo(f"removed gptq/{name}")


@gptq.command()
@click.argument("name", metavar="NAME")
@click.option("--device", help="cpu, cuda, cuda:1, or one not here: cuda:sm86.")
@click.option("--backend", help="Ask about one kernel by name.")
@reported
def explain(name: str, device: str | None, backend: str | None) -> None:
    """Say which kernel would run each layer, and why not the others."""
    import gptq_loader_plugin
    from gptq_loader_extensions.llm.listing import find_listed

    listed = find_listed(name, _models())
    plan = gptq_loader_plugin.explain(listed.reference, device=device, backend=backend)
    click.echo(plan.explain())


def _models() -> list[Listed]:
    import llm

    from gptq_loader_extensions.llm.listing import added, list_models

    return list_models(added(llm.user_dir()))


def _checked(reference: str, name: str | None) -> tuple[str, str]:
    """Find and open the checkpoint; give the reference to keep, and its name."""
    import gptq_loader_plugin
    from gptq_loader_extensions.llm.listing import PREFIX, demo_is_here
    from gptq_loader_plugin.cli.output import ProgressBars
    from gptq_loader_plugin.reference import resolve

    if reference == "demo" and not demo_is_here():
        raise OptionInvalid(
            "the demo model is not on this machine",
            hint="run gptq-loader demo once, in an environment without llm: its package alone "
            "would keep llm from starting",
        )
    bars = ProgressBars()
    try:
        plugins = gptq_loader_plugin.Plugins(bars, installed=True)
        found = resolve(reference, plugins=plugins)
        report = gptq_loader_plugin.inspect(found, plugins=plugins)
    finally:
        bars.close()
    path = local_path(reference)
    local = path.exists()
    name = (name or (path.resolve().stem if local else reference)).removeprefix(PREFIX)
    if not name or any(it.isspace() for it in name):
        raise OptionInvalid(f"{name!r} is no name for a model", hint="name it with --name")
    click.echo(f"gptq/{name}: {report.bits}-bit {report.model_type}, {found}", err=True)
    return str(path.resolve()) if local else reference, name


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
