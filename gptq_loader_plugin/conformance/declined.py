"""Sum up what a kernel declines: each reason once, how often, and which values it is about."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.conformance.grid import AXES, LAYER_AXES

if TYPE_CHECKING:
    from gptq_loader_plugin.conformance.grid import Cell

__all__ = ["ALLOW_NONE", "DeclinedTable", "Reason", "accepts_nothing"]

SHOWN = 5  # reasons of a kernel that accepts nothing
ALLOW_NONE = "let a kernel pass that accepts no cell here, such as one for a GPU that is not there"
NUMBER = re.compile(r"\d+")
ANY = "…"  # stands for a number that differs from cell to cell


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason, over all cells it was given for.

    Attributes:
        words: the kernel's words; a number that differs is "…".
        cells: how many cells.
        axes: the values it was given for, of each axis where they are not all there are.
    """

    words: str
    cells: int
    axes: dict[str, list[Any]]


@dataclass(slots=True)
class DeclinedTable:
    """Collects what a kernel declined."""

    _cells: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    _layers: defaultdict[str, set[Cell]] = field(default_factory=lambda: defaultdict(set))

    def add(self, layer: Cell, reason: str, cells: int) -> None:
        """Count `cells` cells of one layer."""
        self._cells[reason] += cells
        self._layers[reason].add(layer)

    def update(self, other: DeclinedTable) -> None:
        """Add another table's."""
        for reason, cells in other._cells.items():
            self._cells[reason] += cells
            self._layers[reason] |= other._layers[reason]

    @property
    def cells(self) -> int:
        """How many cells were declined."""
        return sum(self._cells.values())

    def reasons(self) -> list[Reason]:
        """List the reasons, the most frequent first."""
        alike: defaultdict[str, list[str]] = defaultdict(list)
        for reason in self._cells:
            alike[NUMBER.sub(ANY, reason)].append(reason)
        reasons = []
        for several in alike.values():
            layers = set().union(*(self._layers[name] for name in several))
            axes = {}
            for axis in LAYER_AXES:
                values = {getattr(layer, axis) for layer in layers}
                if len(values) < len(AXES[axis]):
                    axes[axis] = [value for value in AXES[axis] if value in values]
            reasons.append(
                Reason(_words(several), sum(self._cells[name] for name in several), axes)
            )
        return sorted(reasons, key=lambda reason: (-reason.cells, reason.words))

    def text(self, *, limit: int | None = None) -> str:
        """Write the table: a line for each reason, and one for the values it is about.

        Args:
            limit: how many reasons to write, of the most frequent; None writes all.
        """
        lines = []
        for reason in self.reasons()[:limit]:
            lines.append(f"{reason.cells:>9,}  {reason.words}")
            about = "; ".join(
                f"{axis} {' '.join(map(str, values))}" for axis, values in reason.axes.items()
            )
            lines += [f"{'':>11}{about}"] if about else []
        return "".join(f"{line}\n" for line in lines)


def accepts_nothing(kernel: str, table: DeclinedTable) -> str:
    """Say that a kernel declined every cell, with its most frequent reasons."""
    return (
        f"{kernel} accepts none of {table.cells:,} cells here, so nothing of it was tested:\n"
        f"{table.text(limit=SHOWN)}"
        "if that is expected, as without the GPU it is for, use --allow-none"
    )


def _words(reasons: list[str]) -> str:
    """Merge reasons that differ in numbers alone."""
    numbers = zip(*(NUMBER.findall(reason) for reason in reasons), strict=True)
    merged = iter([number[0] if len(set(number)) == 1 else ANY for number in numbers])
    return NUMBER.sub(lambda _: next(merged), reasons[0])
