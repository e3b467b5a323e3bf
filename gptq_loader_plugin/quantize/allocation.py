"""Choose one of several options for each unit, so that all together stay within a budget.

This is the multiple-choice knapsack problem: of each unit's options, each with a cost and an error,
take one, the costs' sum at most the budget, the errors' sum the least there is. It is solved by
dynamic programming over the cost beyond the cheapest options, counted in steps of a
hundred-thousandth of what the budget leaves beyond them. A cost is rounded up to whole steps, so
the budget always holds, and the result is the optimum of a problem whose costs are off by less
than one step a unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Option", "allocate"]

STEPS = 100_000


class Option(NamedTuple):
    """What a unit may be.

    Attributes:
        cost: what it takes of the budget.
        error: what it loses.
    """

    cost: int
    error: float


def allocate(units: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Choose an option for each unit.

    Args:
        units: the options of each, at least one.
        budget: the most that the chosen options' costs may add up to; the cheapest fit into it.

    Returns:
        The place of each unit's option.
    """
    least = [min(it.cost for it in unit) for unit in units]
    left = budget - sum(least)
    step = max(-(-left // STEPS), 1)
    steps = left // step  # no more than STEPS
    best = np.zeros(steps + 1)  # best[s]: the least error of the units so far within s steps
    picks = np.zeros((len(units), steps + 1), dtype=np.uint8)
    for unit, cheapest, picked in zip(units, least, picks, strict=True):
        errors = np.full(steps + 1, np.inf)
        for place, option in enumerate(unit):
            extra = _steps(option, cheapest, step)
            if extra > steps:
                continue
            with_it = best[: steps + 1 - extra] + option.error
            better = with_it < errors[extra:]
            errors[extra:][better] = with_it[better]
            picked[extra:][better] = place
        best = errors
    at = int(best.argmin())
    chosen: list[int] = []
    for unit, cheapest, picked in zip(reversed(units), reversed(least), picks[::-1], strict=True):
        place = int(picked[at])
        chosen.append(place)
        at -= _steps(unit[place], cheapest, step)
    return chosen[::-1]


def _steps(option: Option, cheapest: int, step: int) -> int:
    """Count the steps that an option costs beyond the cheapest one."""
    return -(-(option.cost - cheapest) // step)
