"""The command that prepares a small model once, and answers with it: demo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gptq_loader_plugin.cli.loading import load_with_bars
from gptq_loader_plugin.cli.options import load_options
from gptq_loader_plugin.cli.output import reported, say
from gptq_loader_plugin.cli.reply import write_reply

if TYPE_CHECKING:
    from gptq_loader_plugin.load_options import LoadOptions

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Answer with a small model, or open a chat page with it.")(
        reported(demo)
    )


@load_options("device", "backend")
def demo(
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="Answer this in the terminal; without it a chat page opens."
        ),
    ] = None,
    *,
    load: LoadOptions,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="The most tokens of a reply.")
    ] = 256,
    host: Annotated[str, typer.Option("--host", help="The page's address.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="The page's port.")] = None,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Prepare a small model once, then answer PROMPT, or open a chat page with it loaded."""
    model = load_with_bars("demo", load)
    say(model.plan.headline())
    if prompt is None:
        from gptq_loader_plugin.plugins import Plugins

        page = Plugins(installed=True).host("gradio")
        page.install(model=model, host=host, port=port, open_browser=browser)
        return
    from gptq_loader_plugin.generation.options import GenerateOptions

    options = GenerateOptions.parse({"max_new_tokens": max_new_tokens, "temperature": 0.0})
    write_reply(model, model.chat([{"role": "user", "content": prompt}], options))
