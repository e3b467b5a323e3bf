"""Keep what was checked and measured in a file that is whole at any time."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Record", "State", "read_json", "write_json"]

State = Literal["running", "done", "out of time", "crashed", "not reached"]


class Record:
    """What one part has checked and measured; each entry is in the file as soon as it is known.

    Args:
        file: where it is kept.
        seconds: how long the part may take.
    """

    def __init__(self, file: Path, seconds: float) -> None:
        self._file = file
        self._end = time.monotonic() + seconds
        self.checks: list[dict[str, Any]] = []
        self.figures: list[dict[str, Any]] = []
        self._write()

    @property
    def left(self) -> float:
        """How many seconds are left."""
        return self._end - time.monotonic()

    def check(self, name: str, passed: bool | None, detail: str = "") -> None:  # noqa: FBT001 - the result itself
        """Note what came of a check: None where it could not be made here, for the reason given."""
        self.checks.append({"name": name, "passed": passed, "detail": detail})
        self._write()

    def figure(self, name: str, **values: Any) -> None:  # noqa: ANN401 - JSON
        """Note what was measured."""
        self.figures.append({"name": name, **values})
        self._write()

    def restart(self) -> None:
        """Forget all notes: those that follow say the same of more."""
        self.checks.clear()
        self.figures.clear()

    @contextmanager
    def checking(self, name: str) -> Iterator[None]:
        """Note whatever is raised as a check that failed, and go on."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            self.check(name, passed=False, detail=f"{type(error).__name__}: {error}"[:2000])

    def _write(self) -> None:
        write_json(self._file, {"checks": self.checks, "figures": self.figures})


def write_json(file: Path, content: object) -> None:
    """Write beside the file, then put that in its place: it is there whole, or as it was."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)  # noqa: PTH105 - Path.replace is the same


def read_json(file: Path) -> dict[str, Any]:
    """Read what was written; nothing where nothing was."""
    if not file.is_file():
        return {}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
