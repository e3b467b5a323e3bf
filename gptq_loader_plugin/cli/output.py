"""What the command writes: errors in two lines, progress bars, JSON."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from gptq_loader_plugin.errors import GPTQLoaderError, is_out_of_memory
from gptq_loader_plugin.hookspecs import hookimpl

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_plugin.events import Progress

__all__ = [
    "ProgressBars",
    "group_text",
    "plain",
    "print_json",
    "print_table",
    "reported",
    "say",
    "show",
    "text_of",
    "yes_no",
]

P = ParamSpec("P")
CTRL_C = 130
FULL = "free some disk space, then run the same command again"
TOO_MANY = "let this process open more files: ulimit -n 1024; then run the same command again"
HINTS = {  # by what the system says
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EFBIG: FULL,
    errno.EMFILE: TOO_MANY,
    errno.ENFILE: TOO_MANY,
}
COLUMN = re.compile(r" *\S+(?: \S+)*  +")  # the first of a line in columns
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but a tab and the end of a line


def say(text: str) -> None:
    """Write words for a person to stderr."""
    print(plain(text), file=sys.stderr, flush=True)  # noqa: T201 - the command's own output


def show(text: str) -> None:
    """Write a result for a person to stdout; a terminal gets no words that are cut in two."""
    width = _width()
    lines = [_folded(line, width) for line in plain(text).split("\n")]
    print("\n".join(lines), flush=True)  # noqa: T201 - the command's own output


def _width() -> float:
    """Return the characters of a line of stdout; what is no terminal has no end."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf


def _folded(line: str, width: float) -> str:
    """Break a line between words, and begin the rest below its first words."""
    if len(line) <= width:
        return line
    start = len(line) - len(line.lstrip())
    column = COLUMN.match(line)
    after = column.end() if column and column.end() < width / 2 else start + 2
    return textwrap.fill(
        line,
        int(width),
        subsequent_indent=" " * after,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
        replace_whitespace=False,
    )


def plain(text: str) -> str:
    """Make control characters visible, which names and cards may hold and terminals obey."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def print_json(data: object) -> None:
    """Write a result to stdout as JSON, escaped where stdout's encoding lacks a letter."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2)
    print(text, flush=True)  # noqa: T201 - the command's own output


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table to stdout, as Markdown writes one.

    On a terminal that is too narrow, each row is a block of lines.
    """
    rows = [[cell.replace("\n", " ") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    if sum(widths) + 3 * len(widths) + 1 > _width():
        for name, *cells in rows:
            show(name)
            for column, cell in zip(columns[1:], cells, strict=True):
                if cell not in ("", "-"):
                    show(f"  {column:<{max(map(len, columns))}} {cell}")
        return
    for row in (columns, tuple("-" * width for width in widths), *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        show(f"| {' | '.join(cells)} |")


def yes_no(value: bool | None, *, unknown: str = "-") -> str:  # noqa: FBT001 - the thing to write
    """Write a yes, a no, or a mark where neither is known."""
    return unknown if value is None else "yes" if value else "no"


def text_of(value: object) -> str:
    """Write a value, or a mark where there is none."""
    return "-" if value is None else str(value)


def group_text(group_size: int | None) -> str:
    """Write a group size; the whole layer in one group is none."""
    return "none" if group_size is not None and group_size < 0 else text_of(group_size)


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what a command raises into `error:` and `hint:` on stderr and an exit code.

    The traceback is shown where `--debug` (or `GPTQ_LOADER_DEBUG=1`) asks for it.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            say("\n" + "; ".join(("stopped", *getattr(stop, "__notes__", ()))))
            raise typer.Exit(CTRL_C) from None
        except BrokenPipeError:  # the reader of stdout has gone, as head does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if os.environ.get("GPTQ_LOADER_DEBUG") == "1":
                raise
            message, hint = _in_words(error)
            say(f"error: {message}\nhint: {hint}")
            try:
                sys.stdout.flush()
            except OSError:  # what it still holds is not to be tried again at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from error

    return run


def _in_words(error: Exception) -> tuple[str, str]:
    if isinstance(error, GPTQLoaderError) and not is_out_of_memory(error):
        return error.message, error.hint
    if is_out_of_memory(error):
        return (
            "out of memory",
            "choose a smaller checkpoint, a shorter prompt, or a backend that keeps weights packed",
        )
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}", HINTS.get(
            error.errno or 0, "check that path and its permissions"
        )
    first = (str(error).splitlines() or [""])[0]
    return (
        f"{type(error).__name__}: {first}",
        "this is a fault of gptq-loader: run it again with --debug, and report what it prints",
    )


class ProgressBars:
    """Show `gptq_progress` as a bar on stderr where that is a terminal, else as rare lines."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._stage = ""
        self._task: Any = None
        self._last_line: tuple[str, int, str] = ("", -1, "")

    @hookimpl
    def gptq_progress(self, progress: Progress) -> None:
        """Draw how far the work has come."""
        if self._quiet or not progress.total:
            return
        if not sys.stderr.isatty():
            self._line(progress)
            return
        if self._stage != progress.stage:
            self.close()
            self._open(progress)
        self._bar.update(
            self._task, completed=progress.done, total=progress.total, detail=progress.detail[-48:]
        )
        if progress.done >= progress.total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._stage = None, ""

    def _open(self, first: Progress) -> None:
        from rich import progress as rich
        from rich.console import Console
        from rich.table import Column

        whole = Column(no_wrap=True)  # a narrow terminal cuts the detail, and nothing else
        rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
        fetched: tuple[rich.ProgressColumn, ...] = ()
        if first.stage == "download":
            fetched = (
                rich.DownloadColumn(table_column=whole),
                rich.TransferSpeedColumn(table_column=whole),
                rich.TimeRemainingColumn(compact=True, table_column=whole),
            )
        self._bar = rich.Progress(
            rich.TextColumn("{task.description:<12}", table_column=whole),
            rich.BarColumn(bar_width=12 if fetched else 30, table_column=whole),
            rich.TaskProgressColumn(table_column=whole),
            *fetched,
            rich.TextColumn("{task.fields[detail]}", style="dim", markup=False, table_column=rest),
            console=Console(stderr=True),
            transient=True,
            expand=True,
        )
        self._stage = first.stage
        # what was there before this run says nothing of its speed
        self._task = self._bar.add_task(first.stage, total=None, completed=first.done, detail="")
        self._bar.start()

    def _line(self, progress: Progress) -> None:
        """Print every tenth of a long work, so that a log shows it is alive."""
        if progress.stage in ("weights", "self-check", "branches"):
            return
        tenth = 10 * progress.done // progress.total
        # a download's detail says who is waited for
        line = (progress.stage, tenth, progress.detail if progress.stage == "download" else "")
        if line != self._last_line:
            self._stage, self._last_line = progress.stage, line
            say(f"{progress.stage}: {10 * tenth} % {progress.detail}".rstrip())
