"""The command that says which kernel runs which layer, and why: explain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

import typer

from gptq_loader_plugin.cli.options import JSON, Checkpoint, load_options
from gptq_loader_plugin.cli.output import print_json, reported, show
from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from gptq_loader_plugin.load_options import LoadOptions

__all__ = ["add_to"]

Anywhere = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, or one not here: cuda:sm86."),
]


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
    """Add this command to the application."""
    app.command(short_help="Say which kernel would run each layer, and why.")(reported(explain))


@load_options("device", "backend", "revision", "device_map", "max_memory", device=Anywhere)
def explain(
    reference: Checkpoint,
    *,
    load: LoadOptions,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="Explain what runs inside another engine: vllm."),
    ] = None,
    as_json: JSON = False,
) -> None:
    """Say which kernel would run each layer, and why not the others, without reading weights."""
    import gptq_loader_plugin as gptq

    if engine is not None:
        if load.device_map is not None:
            raise OptionInvalid(
                f"a device map is not for {engine}, which divides a model in its own way",
                hint="leave out --device-map and --max-memory",
            )
        explaining = _engine(engine)
        explained = explaining.explain(
            reference, device=load.device, backend=load.backend, revision=load.revision
        )
        _show_plan(explained, as_json=as_json)
        return
    plan = gptq.explain(reference, options=load)
    _show_plan(plan, as_json=as_json)


def _engine(name: str) -> _Explaining:
    """Find an engine that can say what it would run.

    Raises:
        OptionInvalid: there is none of that name.
    """
    from gptq_loader_plugin.plugins import Plugins

    engines = {
        host.name: host for host in Plugins(installed=True).hosts() if isinstance(host, _Explaining)
    }
    if name not in engines:
        raise OptionInvalid(
            f"no engine {name!r} can say what it would run",
            hint=f"name {' or '.join(sorted(engines))}, or leave out --engine",
        )
    return engines[name]


def _show_plan(plan: _Explained, *, as_json: bool) -> None:
    if as_json:
        print_json(plan.to_json())
    else:
        show(plan.explain())
