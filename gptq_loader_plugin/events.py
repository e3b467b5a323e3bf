"""What listeners hear about work in progress."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Head", "LoadRequest", "Progress"]

Head = Literal["stored", "int8"]  # what a load does with the model's output head


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """A load that is about to begin, or has ended.

    Attributes:
        reference: what the user typed.
        path: the checkpoint's folder.
        device: the device's name, as messages give it.
        backend: the kernel asked for by name, or None.
    """

    reference: str
    path: Path
    device: str
    backend: str | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a piece of work has come.

    Attributes:
        stage: what is being done: "weights", "download", "quantize", "perplexity", "self-check",
            "tune", "branches", "convert", "compare", "sample".
        done: how much of it is done.
        total: how much there is, in the same unit.
        unit: "bytes", "layers", "windows", "shapes", "branches".
        detail: what is being worked on now, or "".
    """

    stage: str
    done: int
    total: int
    unit: str = "bytes"
    detail: str = ""
