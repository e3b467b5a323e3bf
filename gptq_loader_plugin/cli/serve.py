"""The command that serves a model to other programs: serve."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path  # noqa: TC003 - typer reads it
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_loader_plugin.cli.loading import load_with_bars
from gptq_loader_plugin.cli.options import JSON, load_options
from gptq_loader_plugin.cli.output import reported
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import Engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["add_to"]

LOOPBACK = "127.0.0.1"
OWN = "openai"
ONE_REPLICA = "1"


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Serve OpenAI's API, and Kobold's, to their clients.")(reported(serve))


@load_options()
def serve(  # noqa: PLR0913 - each is an option a user may want
    command: typer.Context,
    reference: Annotated[
        str | None,
        typer.Argument(
            metavar="REF",
            help="A folder, a file, owner/repo:branch, or demo; without it, the first request "
            "loads the model it names.",
        ),
    ] = None,
    *,
    engine: Annotated[
        str,
        typer.Option(
            "--engine", help="What serves: openai, which is this package's own; vllm; or ray."
        ),
    ] = OWN,
    tensor_parallel: Annotated[
        int,
        typer.Option(
            "--tensor-parallel", min=1, help="With --engine vllm: devices each layer is split over."
        ),
    ] = 1,
    replicas: Annotated[
        str,
        typer.Option(
            "--replicas", help="With --engine ray: how many servers, or the least and most, 1-4."
        ),
    ] = ONE_REPLICA,
    host: Annotated[
        str, typer.Option("--host", help="The address; other machines reach 0.0.0.0.")
    ] = LOOPBACK,
    listen: Annotated[
        bool, typer.Option("--listen", help="Serve the whole network: --host 0.0.0.0.")
    ] = False,
    port: Annotated[int, typer.Option("--port", help="The port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="GPTQ_LOADER_API_KEY",
            help="What every request must bring; others can see it in the list of processes, "
            "but not in the environment.",
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let others on the network in without a key.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A name this server goes by; may be repeated."),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option("--cors", help="Let pages of this origin call the API; may be repeated."),
    ] = None,
    models_dir: Annotated[
        Path | None, typer.Option("--models-dir", help="Models in this folder can be named.")
    ] = None,
    cached_models: Annotated[
        bool, typer.Option("--allow-cache", help="Models of the Hugging Face cache, too.")
    ] = False,
    downloads: Annotated[
        bool, typer.Option("--allow-downloads", help="Fetch a model that is named and not here.")
    ] = False,
    pickles: Annotated[
        bool, typer.Option("--allow-pickle", help="Load .bin and .pt files that are named.")
    ] = False,
    max_queue: Annotated[int, typer.Option("--max-queue", help="How many requests may wait.")] = 64,
    max_num_seqs: Annotated[
        int,
        typer.Option(
            "--max-num-seqs",
            "--most-at-once",
            min=1,
            help="How many replies are written side by side.",
        ),
    ] = 16,
    timeout: Annotated[
        float, typer.Option("--timeout", help="Seconds a request may take, its wait included.")
    ] = 600.0,
    max_body: Annotated[int, typer.Option("--max-body", help="The most bytes of a request.")] = 4
    * 2**20,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", help="The most tokens of any reply.")
    ] = None,
    grace: Annotated[
        int, typer.Option("--grace", help="Seconds that running replies get after Ctrl-C.")
    ] = 5,
    load: LoadOptions,
    as_json: JSON = False,
) -> None:
    """Serve OpenAI's API, and Kobold's, to the clients you already use."""
    from gptq_loader_plugin.plugins import Plugins

    plugins = Plugins(installed=True)
    if engine != OWN:
        _serve_by(plugins, engine, reference, command)
        return
    if tensor_parallel != 1 or replicas != ONE_REPLICA:
        raise OptionInvalid(
            f"{_flag('tensor_parallel' if tensor_parallel != 1 else 'replicas', command)} is for "
            "another engine",
            hint="name it: --engine vllm, or --engine ray",
        )
    if reference is None and load.lora:
        raise OptionInvalid(
            "--lora is for the model that is served first, and none was named",
            hint="name it: gptq-loader serve REF --lora NAME=REF",
        )
    stop = threading.Event()
    plugins.host(OWN).install(
        reference=reference,
        load=_load_by(load, _Stopper(stop)),
        stop=stop,
        host="0.0.0.0" if listen and host == LOOPBACK else host,  # noqa: S104 - as asked for
        port=port,
        api_key=api_key,
        no_auth=no_auth,
        allowed_hosts=tuple(allow_host or ()),
        cors=tuple(cors or ()),
        models_dir=models_dir,
        cached_models=cached_models,
        downloads=downloads,
        pickles=pickles,
        max_queue=max_queue,
        max_num_seqs=max_num_seqs,
        timeout=timeout,
        max_body=max_body,
        max_new_tokens=max_new_tokens,
        grace=grace,
        as_json=as_json,
    )


def _load_by(options: LoadOptions, listener: object) -> Callable[[str | Path], LoadedModel]:
    """Return what loads models; the first one alone with the adapters, which are for that."""
    first: set[str] = set()  # what it goes by

    def load(target: str | Path) -> LoadedModel:
        own = not first or str(target) in first
        model = load_with_bars(target, options if own else replace(options, lora=None), listener)
        if own:
            first.update((str(target), str(model.plan.path)))
        return model

    return load


def _serve_by(plugins: Plugins, name: str, reference: str | None, command: typer.Context) -> None:
    """Have another engine serve, with the options that the user gave.

    Raises:
        OptionInvalid: there is no such engine, or it does not take one of the options.
    """
    engines = {host.name: host for host in plugins.hosts() if isinstance(host, Engine)}
    if name not in engines:
        raise OptionInvalid(
            f"there is no engine {name!r}",
            hint=f"the engines are {', '.join(sorted({OWN, *engines}))}",
        )
    if reference is None:
        raise OptionInvalid(
            f"{name} serves one model, and none was named",
            hint=f"name it: gptq-loader serve REF --engine {name}",
        )
    engine, values = engines[name], _passed_options(command)
    if others := sorted(values.keys() - engine.takes):
        raise OptionInvalid(
            f"{name} does not take {', '.join(_flag(other, command) for other in others)}",
            hint=f"it takes {', '.join(_flag(take, command) for take in sorted(engine.takes))}",
        )
    engine.serve(reference, **values)


def _passed_options(command: typer.Context) -> dict[str, Any]:
    """Return the options that the user gave, on the command line or by the environment."""
    sources = {parameter: command.get_parameter_source(parameter) for parameter in command.params}
    return {
        name: command.params[name]
        for name, source in sources.items()
        if name not in ("reference", "engine") and source is not None and source.name != "DEFAULT"
    }


def _flag(name: str, command: typer.Context) -> str:
    """Write an option of this command as the user does."""
    return next(
        max(parameter.opts, key=len)
        for parameter in command.command.params
        if parameter.name == name
    )


class _Stopper:
    """End a load by raising from its progress, once told to."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    @hookimpl
    def gptq_progress(self) -> None:
        """Go on, or not."""
        if self._stop.is_set():
            raise GPTQLoaderError("the server is stopping", hint="start it again")
