"""The command that measures how well a checkpoint predicts a text: perplexity."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.cli.options import JSON, Checkpoint, load_options
from gptq_loader_plugin.cli.output import ProgressBars, print_json, reported, say
from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.measure.perplexity import Perplexity

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Measure how well a checkpoint predicts a text.")(reported(perplexity))


@load_options()
def perplexity(
    reference: Checkpoint,
    *,
    text: Annotated[
        Path | None, typer.Option("--text", help="The text to predict; else a short sample.")
    ] = None,
    characters: Annotated[
        int | None,
        typer.Option("--characters", min=1, help="Read only the first so many characters."),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", help="The most windows.")] = 20,
    window_tokens: Annotated[
        int | None, typer.Option("--window-tokens", help="Tokens of each: 1024, of the sample 256.")
    ] = None,
    load: LoadOptions,
    as_json: JSON = False,
) -> None:
    """Measure how well a checkpoint predicts a text; lower is better.

    The figure is kept, and drawn beside those of other checkpoints in the page's Compare tab.
    """
    import gptq_loader_plugin as gptq
    from gptq_loader_plugin.measure.perplexity import (
        SAMPLE,
        SAMPLE_WINDOW,
        measure_perplexity,
        sample_text,
    )
    from gptq_loader_plugin.plugins import Plugins
    from gptq_loader_plugin.system.paths import read_words

    content = (read_words(text) if text else sample_text())[:characters]
    bars = ProgressBars()
    try:
        listening = Plugins(bars, installed=True)
        with gptq.load(reference, options=load, plugins=listening) as model:
            say(model.plan.headline())
            measured = measure_perplexity(
                model,
                content,
                windows=windows,
                window_tokens=window_tokens or (1024 if text else SAMPLE_WINDOW),
                progress=listening.progress,
            )
            kept = _keep(model, measured, text=content, text_name=text.name if text else SAMPLE)
    finally:
        bars.close()
    if as_json:
        print_json(
            {
                "reference": reference,
                "kept": kept,
                "perplexity": measured.perplexity,
                "windows": measured.windows,
                "window_tokens": measured.window_tokens,
                "kernels": model.plan.kernels(),
            }
        )
        return
    typer.echo(f"{measured.perplexity:.3f}")


def _keep(model: LoadedModel, measured: Perplexity, *, text: str, text_name: str) -> str | None:
    """Keep a figure and return its file; one that cannot be kept is reported all the same."""
    from gptq_loader_plugin.measure.results import MeasuredFiles, measurement
    from gptq_loader_plugin.system.folders import data_folder

    try:
        figure = measurement(model, measured, text=text, text_name=text_name)
        kept = MeasuredFiles(data_folder()).keep(figure)
    except GPTQLoaderError as error:
        say(f"{error.message}; {error.hint}")
        return None
    say(f"kept in {kept}; the page's Compare tab draws it")
    return str(kept)
