"""The command that forecasts size, memory and speed before a download: forecast."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_loader_plugin.cli.options import JSON, Checkpoint, FitContext
from gptq_loader_plugin.cli.output import group_text, print_json, print_table, reported, show
from gptq_loader_plugin.errors import OptionInvalid, UnsupportedFormat
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.catalog.forecast import Forecast
    from gptq_loader_plugin.quantize.sizes import Size

__all__ = ["add_to"]

GB = 1e9


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Forecast memory and speed, or the sizes a model could have.")(
        reported(forecast)
    )


def forecast(
    reference: Checkpoint,
    *,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda:1, or one not here: cuda:sm86.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="A GPU that is not here, by name: RTX 3090.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option("--bandwidth", min=0.1, help="GB a second of its memory.")
    ] = None,
    context: FitContext = 4096,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Forecast what a checkpoint takes in memory and how fast it replies, from its headers.

    Of a model that is not quantised: what its checkpoints would take, by config.json alone.
    """
    from gptq_loader_plugin.catalog.forecast import forecast as make_forecast
    from gptq_loader_plugin.catalog.headers_alone import with_config, with_headers
    from gptq_loader_plugin.device import find_device
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.quantize.sizes import forecast_sizes

    named = _named(gpu)
    where = find_device(device or ("cuda:sm86" if named else None))
    plugins = Plugins(installed=True)
    try:
        made = with_headers(
            reference,
            lambda checkpoint: make_forecast(
                checkpoint,
                replace(where, assume_built=True) if named else where,
                plugins.kernels(),
                context=context,
                gpu=named,
                bandwidth=bandwidth and bandwidth * GB,
            ),
            revision=revision,
            plugins=plugins,
        )
    except UnsupportedFormat as error:
        if "not quantised" not in error.message:
            raise
        sizes = with_config(reference, forecast_sizes, revision=revision, plugins=plugins)
        _write([asdict(size) for size in sizes], as_json=as_json, sizes=sizes)
        return
    _write(made.to_json(), as_json=as_json, made=made)


def _named(gpu: str | None) -> str | None:
    """Find a GPU in the table by what a user calls it.

    Raises:
        OptionInvalid: none or several are called so.
    """
    from gptq_loader_plugin.catalog.forecast import BANDWIDTHS

    if gpu is None:
        return None
    key = gpu.lower().replace(" ", "")
    names = {name.lower().replace(" ", ""): name for name in BANDWIDTHS}
    if key in names:
        return names[key]
    like = [name for other, name in names.items() if key in other]
    if len(like) != 1:
        raise OptionInvalid(
            f"{gpu} is {'several' if like else 'none'} of the GPUs whose bandwidth is known",
            hint=f"name one of: {', '.join(like or BANDWIDTHS)}; or give --bandwidth",
        )
    return like[0]


def _write(
    data: Any,  # noqa: ANN401 - what JSON holds
    *,
    as_json: bool,
    made: Forecast | None = None,
    sizes: Sequence[Size] = (),
) -> None:
    if as_json:
        print_json(data)
    elif made is not None:
        _show(made)
    else:
        rows = [
            (
                str(it.bits),
                group_text(it.group_size),
                f"{it.size_bytes / GB:.2f} GB" if it.size_bytes > GB else write_size(it.size_bytes),
            )
            for it in sizes
        ]
        print_table(("Bits", "GS", "Size"), rows)
        show("It is not quantised: these are what its GPTQ checkpoints would take, with a g_idx")


def _show(made: Forecast) -> None:
    show(f"On {made.device}, with {made.context:,} tokens of context:")
    width = max(map(len, made.parts))
    for name, count in made.parts.items():
        show(f"  {name:<{width}}  {write_size(count)}")
    show(f"  {'together':<{width}}  {write_size(made.memory_bytes)}")
    if made.bandwidth is None or made.tokens_per_second is None:
        show(f"Speed: its memory's bandwidth is {made.bandwidth_source}")
        return
    each = f"{write_size(made.token_bytes)} a token at {made.bandwidth / GB:.0f} GB/s"
    full = f"{made.at_full_context or 0:.1f} once the context is full"
    if made.slowest is None:
        show(
            f"Speed: at most {made.fastest:.1f} tokens a second, {full}: {each}, "
            f"{made.bandwidth_source}; how near a GPU comes to that is not measured"
        )
        return
    show(
        f"Speed: {made.tokens_per_second:.1f} tokens a second ({made.slowest:.1f} to "
        f"{made.fastest:.1f}), {full}: {each}, {made.bandwidth_source}"
    )
