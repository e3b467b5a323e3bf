"""The command that chats in the terminal: chat."""

from __future__ import annotations

import difflib
import re
import sys
from typing import TYPE_CHECKING

from gptq_loader_plugin.cli.line_editor import make_line_reader
from gptq_loader_plugin.cli.loading import load_with_bars
from gptq_loader_plugin.cli.options import (
    SAMPLING,
    Checkpoint,
    ShowThoughts,
    System,
    load_options,
    sampling,
)
from gptq_loader_plugin.cli.output import reported, say
from gptq_loader_plugin.cli.reply import ReplyWriter, Thoughts, system_message
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid

if TYPE_CHECKING:
    import typer

    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions
    from gptq_loader_plugin.load_options import LoadOptions

__all__ = ["add_to"]

COMMANDS = {
    "help": "list these",
    "new": "start again",
    "undo": "take back the last message and its reply",
    "retry": "have the last message answered anew",
    "system": "show the system message, or /system TEXT to set it and start again",
    "set": "show the options, or /set temperature 0.3",
    "thoughts": "/thoughts show or /thoughts fold",
    "explain": "which kernels run, and why",
    "quit": "leave; so does Ctrl-D",
}
WELCOME = "/help lists the commands; Ctrl-C stops a reply, Ctrl-D or /quit leaves"
COMMAND = re.compile(r"/([A-Za-z]\S*)\s*(.*)", re.DOTALL)


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="Chat in the terminal.")(reported(chat))


@load_options()
@sampling
def chat(
    reference: Checkpoint,
    *,
    system: System = None,
    thoughts: ShowThoughts = "show",
    options: GenerateOptions,
    load: LoadOptions,
) -> None:
    """Chat in the terminal: with a history, editing, and commands that begin with a slash."""
    model = load_with_bars(reference, load)
    say(model.plan.headline())
    say(WELCOME)
    Chat(model, options, system_message(model, system), thoughts).run()


class Chat:
    """A conversation in the terminal.

    Args:
        model: what answers.
        options: how to sample.
        first: the system message, if there is one.
        thoughts: whether the model's are shown, or their time alone.
    """

    def __init__(
        self,
        model: LoadedModel,
        options: GenerateOptions,
        first: list[dict[str, str]],
        thoughts: Thoughts = "show",
    ) -> None:
        self._model, self._options = model, options
        self._thoughts: Thoughts = thoughts
        self._first = first
        self._messages = [*first]
        self._ended = False

    def run(self) -> None:
        """Read messages and answer them, until the user leaves."""
        reader = make_line_reader(COMMANDS)
        is_terminal = sys.stdin.isatty()
        while not self._ended:
            try:
                typed = reader.read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                say("Ctrl-D or /quit leaves")
                continue
            except UnicodeDecodeError:  # as a terminal of another encoding writes
                say("error: that was no valid text\nhint: set the terminal to UTF-8")
                continue
            try:
                self._take(typed)
            except GPTQLoaderError as error:
                if not is_terminal:
                    raise
                say(f"error: {error.message}\nhint: {error.hint}")  # and the next may be better

    def _take(self, typed: str) -> None:
        """Do what a command says, or answer a message."""
        command = COMMAND.fullmatch(typed.rstrip())
        if command is not None:
            self._obey(command[1].lower(), command[2].strip())
        elif text := typed.strip():
            self._answer([*self._messages, {"role": "user", "content": text}])

    def _obey(self, name: str, value: str) -> None:
        """Do what a command says.

        Raises:
            OptionInvalid: there is no such command, or not with that value.
        """
        match name:
            case "help":
                width = max(map(len, COMMANDS)) + 1
                say("\n".join(f"/{it:<{width}} {does}" for it, does in COMMANDS.items()))
                say("Enter sends, Alt-Enter begins a line; a space first sends what begins with /")
            case "quit":
                self._ended = True
            case "new":
                self._messages = [*self._first]
            case "undo":
                self._undo()
            case "retry":
                self._retry()
            case "explain":
                say(self._model.explain())
            case _:
                self._change(name, value)

    def _change(self, name: str, value: str) -> None:
        """Change a setting of the conversation's, or refuse a command that there is not."""
        match name:
            case "system":
                self._set_system(value)
            case "set":
                self._set(value)
            case "thoughts" if value in ("show", "fold"):
                self._thoughts = "show" if value == "show" else "fold"
            case "thoughts":
                raise OptionInvalid(
                    f"thoughts are shown or folded, not {value or 'nothing'}",
                    hint="write /thoughts show, or /thoughts fold",
                )
            case _:
                near = difflib.get_close_matches(name, COMMANDS, n=1)
                raise OptionInvalid(
                    f"there is no command /{name}",
                    hint=(
                        f"did you mean /{near[0]}? " if near else "see /help for those there are; "
                    )
                    + "a space first sends it to the model",
                )

    def _retry(self) -> None:
        if last := self._undo():
            self._answer([*self._messages, last])

    def _undo(self) -> dict[str, str] | None:
        """Take back the last message of the user's and what followed; return that message."""
        roles = [message["role"] for message in self._messages]
        if "user" not in roles:
            say("there is no message yet")
            return None
        last = len(roles) - 1 - roles[::-1].index("user")
        message, self._messages = self._messages[last], self._messages[:last]
        return message

    def _set_system(self, value: str) -> None:
        if not value:
            say(self._first[0]["content"] if self._first else "there is no system message")
            return
        self._first = system_message(self._model, value)
        self._messages = [*self._first]

    def _set(self, value: str) -> None:
        """Show the options for sampling, or set one.

        Raises:
            OptionInvalid: there is no such option, or the value is out of range.
        """
        from gptq_loader_plugin.generation.options import GenerateOptions

        name, _, number = value.replace("=", " ").partition(" ")
        if not value:
            current = self._options.model_dump()
            say("\n".join(f"{it:<20} {current[it]}" for it in SAMPLING))
            return
        name = name.replace("-", "_")
        if name not in SAMPLING or not number.strip():
            near = difflib.get_close_matches(name, SAMPLING, n=1)
            raise OptionInvalid(
                f"/set takes a name and a number, not {value!r}",
                hint=f"did you mean {near[0]}?" if near else f"the names are {', '.join(SAMPLING)}",
            )
        fields = {**self._options.model_dump(), name: number.strip()}
        self._options = GenerateOptions.parse(fields)

    def _answer(self, messages: list[dict[str, str]]) -> None:
        """Answer the last message; Ctrl-C ends the reply and not the chat."""
        writer = ReplyWriter(self._thoughts)
        try:
            for piece in self._model.chat(
                messages, self._options, when_too_long="drop-oldest", separate_thoughts=True
            ):
                writer.write(piece)
            writer.end_thought()
        except KeyboardInterrupt:
            writer.end_thought()
            say("\n(stopped)")
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._messages = [*messages, {"role": "assistant", "content": writer.text}]
