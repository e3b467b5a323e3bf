"""A terminal of our own that a program runs in: what it draws is read as a person would see it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import termios
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pyte
from processes import start_process
from waiting import eventually

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator, Sequence

__all__ = ["CTRL_C", "CTRL_D", "LEFT", "UP", "Terminal", "open_terminal"]

CTRL_C, CTRL_D, UP, LEFT = "\x03", "\x04", "\x1b[A", "\x1b[D"
SECONDS = 90  # for what a program draws, on a machine with other work


class Terminal:
    """A program in a terminal.

    Args:
        process: the program.
        file: our end of the terminal.
        columns: how wide it is.
        rows: how high it is.
    """

    def __init__(
        self, process: subprocess.Popen[str], file: int, *, columns: int, rows: int
    ) -> None:
        self.process = process
        self._file = file
        self._screen = pyte.HistoryScreen(columns, rows, history=2000)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""

    def send(self, text: str) -> None:
        """Press keys."""
        os.write(self._file, text.encode())

    def paste(self, text: str) -> None:
        """Paste a text, as terminals do that mark it."""
        self.send(f"\x1b[200~{text}\x1b[201~")

    def text(self) -> str:
        """Return all lines there were, the oldest first."""
        above = [
            "".join(line[x].data for x in range(self._screen.columns))
            for line in self._screen.history.top
        ]
        return "\n".join(line.rstrip() for line in (*above, *self._screen.display))

    def wait_for(self, text: str, *, times: int = 1, seconds: float = SECONDS) -> str:
        """Wait until a text is on the screen so many times; return all there is."""
        __tracebackhide__ = True

        def is_shown() -> bool:
            return self.text().count(text) >= times

        def is_shown_or_ended() -> bool:
            return is_shown() or not self._read(0.2)

        eventually(is_shown_or_ended, seconds, awaited=repr(text), log=self.text)
        assert is_shown(), f"it ended without {text!r}:\n{self.text()}"
        return self.text()

    def wait_for_end(self, seconds: float = SECONDS) -> int:
        """Wait until the program has ended; return its exit code."""
        __tracebackhide__ = True
        eventually(lambda: not self._read(0.2), seconds, awaited="the end", log=self.text)
        return self.process.wait(timeout=seconds)

    def _read(self, seconds: float) -> bool:
        """Read what is there; return whether more may come."""
        ready, _, _ = select.select([self._file], [], [], seconds)
        if not ready:
            return True
        try:
            read = os.read(self._file, 1 << 16)
        except OSError:  # as Linux says that the other end is closed
            return False
        if b"\x1b[6n" in read:  # it asks where the cursor is
            os.write(self._file, b"\x1b[%d;%dR" % (self._screen.cursor.y + 1, 1))
        self.raw += read
        self._stream.feed(read)
        return bool(read)


@contextmanager
def open_terminal(
    command: Sequence[object], *, columns: int = 100, rows: int = 30, **options: Any
) -> Iterator[Terminal]:
    """Run a command in a terminal; kill it if it outlives the block."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", **options.pop("env", {})}
    environment.pop("COLUMNS", None)

    def take_terminal() -> None:  # so that Ctrl-C reaches it
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs, **options}
    try:
        with start_process(
            command, env=environment, preexec_fn=take_terminal, **streams
        ) as process:
            os.close(theirs)
            theirs = -1
            yield Terminal(process, ours, columns=columns, rows=rows)
    finally:
        if theirs >= 0:
            os.close(theirs)
        os.close(ours)
