"""Write a person's files whole or not at all, and put damaged ones aside."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["is_aside", "put_aside", "write_whole"]

ASIDE = ".damaged-"


def write_whole(path: Path, text: str) -> None:
    """Write beside the file, then put that in its place: a crash leaves one or the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def put_aside(path: Path) -> Path:
    """Give a damaged file a name that no file has; tell it.

    Raises:
        OSError: it cannot be renamed.
    """
    number = 1
    while (aside := path.with_name(f"{path.stem}{ASIDE}{number}{path.suffix}")).exists():
        number += 1
    return path.replace(aside)


def is_aside(path: Path) -> bool:
    """Whether a file is one that was put aside."""
    return ASIDE in path.name
