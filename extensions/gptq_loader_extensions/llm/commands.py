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

    from gptq_loader_extensions.llm.listing import ListedModel

__all__ = ["gptq"]

P = ParamSpec("P")


def with_click_errors(command: Callable[P, None]) -> Callable[P, None]:
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
@with_click_errors
def list_(*, as_json: bool) -> None:
    """List the checkpoints of this machine, and where each one was found."""
    models = _models()
    if as_json:
        rows = [
            {
                "model_id": f"gptq/{model.name}",
                "reference": model.reference,
                "source": model.source,
            }
            for model in models
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    width = max((len(model.name) for model in models), default=0)
    for model in models:
        click.echo(f"gptq/{model.name:<{width}}  {model.source}: {model.reference}")
    if not models:
        click.echo("none; add one: llm gptq add REF", err=True)


@gptq.command()
@click.argument("reference", metavar="REF")
@click.option("--name", help="Its name, gptq/NAME; default: its folder's, or REF.")
@with_click_errors
def add(reference: str, name: str | None) -> None:
    """Add a checkpoint: a folder, a file, or owner/repo:branch, which is downloaded."""
    import llm

    from gptq_loader_extensions.llm.listing import add_to_list

    reference, name = _check(reference, name)
    add_to_list(llm.user_dir(), name, reference)
    click.echo(f"added; try it: llm -m {_quoted(f'gptq/{name}')} 'Hello'")


@gptq.command()
@click.argument("name", metavar="NAME")
@with_click_errors
def remove(name: str) -> None:
    """Remove a name from the list; the checkpoint's files stay."""
    import llm

    from gptq_loader_extensions.llm.listing import PREFIX, remove_from_list

    name = name.removeprefix(PREFIX)
    remove_from_list(llm.user_dir(), name)
    click.echo(f"removed gptq/{name}")


@gptq.command()
@click.argument("name", metavar="NAME")
@click.option("--device", help="cpu, cuda, cuda:1, or one not here: cuda:sm86.")
@click.option("--backend", help="Ask about one kernel by name.")
@with_click_errors
def explain(name: str, device: str | None, backend: str | None) -> None:
    """Explain which kernel would run each layer, and why not the others."""
    import gptq_loader_plugin
    from gptq_loader_extensions.llm.listing import find_listed

    listed = find_listed(name, _models())
    plan = gptq_loader_plugin.explain(listed.reference, device=device, backend=backend)
    click.echo(plan.explain())


def _models() -> list[ListedModel]:
    import llm

    from gptq_loader_extensions.llm.listing import list_models, read_added

    return list_models(read_added(llm.user_dir()))


def _check(reference: str, name: str | None) -> tuple[str, str]:
    """Find and open the checkpoint; return the reference to store, and its name."""
    import gptq_loader_plugin
    from gptq_loader_extensions.llm.listing import PREFIX, demo_available
    from gptq_loader_plugin.cli.output import ProgressBars
    from gptq_loader_plugin.reference import resolve

    if reference == "demo" and not demo_available():
        raise OptionInvalid(
            "the demo model is not on this machine",
            hint="run gptq-loader demo once, in an environment without llm: its package would "
            "keep llm from starting",
        )
    bars = ProgressBars()
    try:
        plugins = gptq_loader_plugin.Plugins(bars, installed=True)
        checkpoint = resolve(reference, plugins=plugins)
        report = gptq_loader_plugin.inspect(checkpoint, plugins=plugins)
    finally:
        bars.close()
    path = local_path(reference)
    is_path = path.exists()
    name = (name or (path.resolve().stem if is_path else reference)).removeprefix(PREFIX)
    if not name or any(letter.isspace() for letter in name):
        raise OptionInvalid(f"{name!r} cannot be a model's name", hint="choose another with --name")
    click.echo(f"gptq/{name}: {report.bits}-bit {report.model_type}, {checkpoint}", err=True)
    return str(path.resolve()) if is_path else reference, name


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
