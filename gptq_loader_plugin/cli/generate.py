"""The command that answers one prompt: generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.cli.loading import load_with_bars
from gptq_loader_plugin.cli.options import (
    JSON,
    Checkpoint,
    ShowThoughts,
    System,
    load_options,
    sampling,
    valid_text,
)
from gptq_loader_plugin.cli.output import print_json, reported, say
from gptq_loader_plugin.cli.reply import system_message, write_reply

if TYPE_CHECKING:
    from gptq_loader_plugin.generation.options import GenerateOptions
    from gptq_loader_plugin.load_options import LoadOptions

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(reported(generate))


@load_options()
@sampling
def generate(
    reference: Checkpoint,
    *,
    prompt: Annotated[
        str,
        typer.Option("--prompt", help="What to answer, or to complete.", callback=valid_text),
    ],
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Complete the prompt as it is, without a template.")
    ] = False,
    thoughts: ShowThoughts = "show",
    options: GenerateOptions,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End the reply here; may be repeated.")
    ] = None,
    load: LoadOptions,
    as_json: JSON = False,
) -> None:
    """Answer one prompt and leave; stdout has the reply alone."""
    options = options.model_copy(update={"stop": tuple(stop or ())})
    model = load_with_bars(reference, load)
    say(model.plan.headline())
    if raw:
        pieces = model.stream(prompt, options)
    else:
        pieces = model.chat(
            [*system_message(model, system), {"role": "user", "content": prompt}],
            options,
            separate_thoughts=True,
        )
    if not as_json:
        write_reply(model, pieces, thoughts)
        return
    whole = list(pieces)
    print_json(
        {
            "text": "".join(piece.text for piece in whole),
            "thoughts": "".join(piece.thought for piece in whole),
            "tokens": whole[-1].tokens,
            "finish": whole[-1].finish,
            "template": model.template.name,
            "kernels": model.plan.kernels(),
        }
    )
