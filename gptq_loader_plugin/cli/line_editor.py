"""Read what a user types, with editing, history and pastes of many lines where these work."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from gptq_loader_plugin.system.folders import data_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LineReader", "make_line_reader"]

HISTORY = "chat-history"
PLACEHOLDER = "a message, or /help"


class LineReader(Protocol):
    """Reads one message after another."""

    def read(self) -> str:
        """Wait for the next one.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        ...


class PlainReader:
    """Read a line at a time, of a pipe or of a terminal that can do no more."""

    def read(self) -> str:
        """Wait for the next line."""
        return input("> " if sys.stdin.isatty() else "")


class LineEditor:
    """Edit a message, with those of earlier chats to go back to.

    Enter sends it; Alt-Enter begins a line. Lines that are pasted stay one message. What
    is written goes to stderr, so that stdout has the replies alone.

    Args:
        commands: what is completed after a `/`, and what each does.
    """

    def __init__(self, commands: Mapping[str, str]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import create_output

        self._session: PromptSession[str] = PromptSession(
            "> ",
            multiline=True,
            prompt_continuation=". ",
            placeholder=[("fg:ansibrightblack", PLACEHOLDER)],
            history=_history(),
            completer=WordCompleter(
                [f"/{name}" for name in commands],
                sentence=True,
                meta_dict={f"/{name}": does for name, does in commands.items()},
            ),
            complete_while_typing=False,
            key_bindings=_bindings(),
            output=create_output(stdout=sys.stderr),
        )

    def read(self) -> str:
        """Wait for the next message."""
        return self._session.prompt()


def make_line_reader(commands: Mapping[str, str]) -> LineReader:
    """Make what reads messages from where they come from: a terminal, or a pipe."""
    is_terminal = sys.stdin.isatty() and sys.stderr.isatty()
    if not is_terminal or os.environ.get("TERM", "") in ("", "dumb", "unknown"):
        return PlainReader()
    return LineEditor(commands)


def _history() -> Any:  # noqa: ANN401 - prompt_toolkit's
    """Keep messages in a file that nobody else reads; in memory where that cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = data_folder() / HISTORY
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    if not os.access(path, os.R_OK | os.W_OK):
        return InMemoryHistory()
    return FileHistory(str(path))


def _bindings() -> Any:  # noqa: ANN401 - prompt_toolkit's
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    @bindings.add("c-j")  # which Enter is while a reply is being written
    def _(event: Any) -> None:  # noqa: ANN401 - prompt_toolkit's
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: Any) -> None:  # noqa: ANN401 - prompt_toolkit's
        event.current_buffer.insert_text("\n")

    return bindings


with suppress(ImportError):  # what `input` edits by, where Python has it
    import readline  # noqa: F401
