"""Write a file whole or not at all, whatever ends this process; put damaged ones aside."""

from __future__ import annotations

import glob
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["is_quarantined", "quarantine", "write_whole"]

MARK = ".damaged-"
LONGEST = 3600.0  # seconds that a write may take: a part of before is a killed process's


def write_whole(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Write beside `path` and on the disk, then put that in its place.

    What a process that was killed left beside it goes, too.

    Args:
        path: the file; its folder is made where it is not there.
        text: what it is to hold.
        mode: who may read and write it, less what the process's umask takes away.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(FileNotFoundError):  # another process has put it in its place meanwhile
            if time.time() - left.stat().st_mtime > LONGEST:
                left.unlink()
    part = path.with_name(f".{path.name}.{uuid4().hex[:8]}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:  # noqa: PTH123 - of a descriptor
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def quarantine(path: Path) -> Path:
    """Rename a damaged file to a name that no file has, and return its new path.

    Raises:
        OSError: it cannot be renamed.
    """
    number = 1
    while (target := path.with_name(f"{path.stem}{MARK}{number}{path.suffix}")).exists():
        number += 1
    return path.replace(target)


def is_quarantined(path: Path) -> bool:
    """Whether a file is one that was put aside."""
    return MARK in path.name
