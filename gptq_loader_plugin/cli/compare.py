"""The command that compares checkpoints of one model: compare."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptq_loader_plugin.cli.options import JSON, load_options
from gptq_loader_plugin.cli.output import ProgressBars, print_json, print_table, reported, say
from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.measure.compare import Comparison

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Compare checkpoints: perplexity, divergence, bytes and speed.")(
        reported(compare)
    )


@load_options("device", "backend", "dtype", "context", "head", "check")
def compare(
    references: Annotated[
        list[str], typer.Argument(metavar="REF...", help="Checkpoints of one model.")
    ],
    *,
    unquantized: Annotated[
        Path | None,
        typer.Option(
            "--reference",
            help="The model they were made of: a folder or a .gguf file; else the first REF.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", help="The text to predict; else a short sample.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="The most windows.")] = 20,
    window_tokens: Annotated[
        int, typer.Option("--window-tokens", min=2, help="Tokens of each.")
    ] = 256,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Time a prompt and a reply, too.")
    ] = True,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write the table and a chart to this file.")
    ] = None,
    load: LoadOptions,
    as_json: JSON = False,
) -> None:
    """Compare checkpoints of one model on one text, one in memory at a time.

    Of each: perplexity, how far its next-token probabilities are from the reference's, how often
    both have the same likeliest token, bytes and speed. The figures are kept for the Compare tab.
    """
    from gptq_loader_plugin.measure.compare import compare_checkpoints
    from gptq_loader_plugin.measure.comparison_page import (
        COLUMNS,
        comparison_page,
        comparison_rows,
    )
    from gptq_loader_plugin.measure.perplexity import SAMPLE, sample_text
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.system.atomic_file import write_whole
    from gptq_loader_plugin.system.paths import read_words

    content = read_words(text) if text else sample_text()
    text_name = text.name if text else SAMPLE
    bars = ProgressBars()
    try:
        plugins = Plugins(bars, installed=True)
        comparison = compare_checkpoints(
            references,
            content,
            text_name=text_name,
            options=load,
            plugins=plugins,
            unquantized=unquantized,
            windows=windows,
            window_tokens=window_tokens,
            speed=speed,
            progress=plugins.progress,
        )
    finally:
        bars.close()
    _keep(comparison)
    if page is not None:
        write_whole(page, comparison_page(comparison, text_name=text_name))
        say(f"written: {page}")
    if as_json:
        print_json(_data(comparison, text_name))
        return
    print_table(COLUMNS, comparison_rows(comparison))


def _data(comparison: Comparison, text_name: str) -> dict[str, Any]:
    return {
        "text": text_name,
        "windows": comparison.windows,
        "window_tokens": comparison.window_tokens,
        "noise": asdict(comparison.noise),
        "models": [asdict(model) for model in comparison.models],
    }


def _keep(comparison: Comparison) -> None:
    """Keep the perplexities for the page; what cannot be kept is reported all the same."""
    from gptq_loader_plugin.measure.results import MeasuredFiles
    from gptq_loader_plugin.system.folders import data_folder

    for figure in comparison.measured:
        try:
            MeasuredFiles(data_folder()).keep(figure)
        except GPTQLoaderError as error:
            say(f"{error.message}; {error.hint}")
            return
