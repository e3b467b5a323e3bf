"""The command that writes a checkpoint in another format: convert."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_loader_plugin.cli.options import JSON, Checkpoint
from gptq_loader_plugin.cli.output import ProgressBars, print_json, reported, say, show
from gptq_loader_plugin.system.units import parse_size, write_size

if TYPE_CHECKING:
    from gptq_loader_plugin.convert.pieces import Conversion

__all__ = ["add_to"]

SHOWN = 20  # layers that a person reads; --json has all


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Write a checkpoint in another format, exactly where it can be.")(
        reported(convert)
    )


def convert(
    reference: Checkpoint,
    out: Annotated[Path, typer.Argument(help="The folder to write; for GGUF a file or a folder.")],
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="gguf, dense, compressed-tensors, awq, gptq, gptq_v2, or safetensors (the same "
            "tensors in files of another size).",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of dense weights: float32, float16 or bfloat16."),
    ] = None,
    shard_size: Annotated[
        str, typer.Option("--shard-size", help="The most of a safetensors file: 5GB, 500MB.")
    ] = "5GB",
    pretokenizer: Annotated[
        str | None,
        typer.Option(
            "--pretokenizer", help="For GGUF: llama.cpp's name of how text is split; else found."
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit on the hub.")
    ] = None,
    as_json: JSON = False,
) -> None:
    """Write a checkpoint in another format: to the bit where that can hold it, else with its error.

    A layer is in memory at a time. What is written has its name once it is whole.
    """
    from gptq_loader_plugin.convert.options import DTYPES, ConvertOptions, parse_format
    from gptq_loader_plugin.convert.run import convert_checkpoint
    from gptq_loader_plugin.errors import OptionInvalid
    from gptq_loader_plugin.plugins import Plugins

    if dtype is not None and (dtype not in DTYPES or to != "dense"):
        raise OptionInvalid(
            f"--dtype {dtype} is of no use here",
            hint=f"with --to dense it is one of {', '.join(DTYPES)}",
        )
    options = ConvertOptions(
        format=parse_format(to),
        dtype=next((it for it in DTYPES if it == dtype), None),
        shard_bytes=parse_size(shard_size),
        pretokenizer=pretokenizer,
    )
    bars = ProgressBars()
    try:
        plugins = Plugins(bars, installed=True)
        done = convert_checkpoint(
            reference, out, options=options, plugins=plugins, revision=revision
        )
    finally:
        bars.close()
    for warning in done.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json(_data(reference, done))
        return
    _show(done)
    typer.echo(done.path)


def _data(reference: str, done: Conversion) -> dict[str, Any]:
    exact = sum(layer.exact for layer in done.layers)
    return {
        "reference": reference,
        "path": str(done.path),
        "format": done.format,
        "source_bytes": done.source_bytes,
        "written_bytes": done.written_bytes,
        "exact": exact == len(done.layers),
        "exact_layers": exact,
        "layers": [{**asdict(layer), "exact": layer.exact} for layer in done.layers],
        "warnings": list(done.warnings),
    }


def _show(done: Conversion) -> None:
    rounded = [layer for layer in done.layers if not layer.exact]
    count, exact = len(done.layers), len(done.layers) - len(rounded)
    sizes = f"{write_size(done.source_bytes)} -> {write_size(done.written_bytes)}"
    say(f"{exact} of {count} layers are the same to the bit; {sizes}")
    for note in sorted({layer.note for layer in rounded}):
        layers = [layer for layer in rounded if layer.note == note]
        worst = max(layer.error for layer in layers)
        say(f"{len(layers)} layers: {note}; at most {100 * worst:.3g} % off (root mean square)")
    for layer in rounded[:SHOWN]:
        show(f"{layer.name}  {layer.kind}  {100 * layer.error:.3g} %")
    if len(rounded) > SHOWN:
        show(f"... and {len(rounded) - SHOWN} more; --json has them all")
