"""Make a path of what a user typed, and read the text there."""

from __future__ import annotations

import os
from pathlib import Path

from gptq_loader_plugin.errors import OptionInvalid

__all__ = ["local_path", "read_words"]


def local_path(typed: str | Path) -> Path:
    """Make a path, with `~` read; `~somebody` stays as it is where nobody is called so."""
    return Path(os.path.expanduser(typed))  # noqa: PTH111 - Path's own raises there


def read_words(file: Path) -> str:
    """Read a file of text.

    Raises:
        OptionInvalid: it holds something else.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionInvalid(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start:,})",
            hint="name a text file, saved as UTF-8",
        ) from error
