"""The command that chats in the terminal: chat."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from gptq_loader_plugin.cli.loading import load_with_bars
from gptq_loader_plugin.cli.options import Checkpoint, System, load_options, sampling
from gptq_loader_plugin.cli.output import reported, say
from gptq_loader_plugin.cli.reply import system_message
from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    import typer

    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions
    from gptq_loader_plugin.load_options import LoadOptions

__all__ = ["add_to"]

HELP = "/new starts again, /explain says which kernels run, /quit leaves; Ctrl-C stops a reply"


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(reported(chat))


@load_options()
@sampling
def chat(
    reference: Checkpoint,
    *,
    system: System = None,
    options: GenerateOptions,
    load: LoadOptions,
) -> None:
    """Chat in the terminal."""
    model = load_with_bars(reference, load)
    say(model.plan.headline())
    say(HELP)
    first = system_message(model, system)
    messages: list[dict[str, str]] = [*first]
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError:  # as a terminal of another encoding writes
            say("error: that was no valid text\nhint: set the terminal to UTF-8")
            continue
        match text:
            case "":
                continue
            case "/quit":
                return
            case "/new":
                messages = [*first]
            case "/explain":
                say(model.explain())
            case _:
                turns = [*messages, {"role": "user", "content": text}]
                try:
                    reply = _turn(model, turns, options)
                except GPTQLoaderError as error:
                    if not sys.stdin.isatty():
                        raise
                    say(f"error: {error.message}\nhint: {error.hint}")  # and the next may be better
                    continue
                messages = [*turns, {"role": "assistant", "content": reply}]


def _turn(model: LoadedModel, messages: list[dict[str, str]], options: GenerateOptions) -> str:
    """Answer one turn; Ctrl-C ends the reply and not the chat."""
    reply = ""
    try:
        for piece in model.chat(messages, options, when_too_long="drop-oldest"):
            if piece.warning:
                say(f"warning: {piece.warning}")
            reply += piece.text
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    except KeyboardInterrupt:
        say("\n(stopped)")
    sys.stdout.write("\n")
    return reply
