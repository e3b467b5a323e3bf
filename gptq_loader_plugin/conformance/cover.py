"""Choose some hundred cells of the grid in which every pair of values of two axes meets."""

from __future__ import annotations

from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import numpy as np

from gptq_loader_plugin.conformance.grid import AXES, INPUT_AXES, TURNS, Cell

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

__all__ = ["Pair", "pairs_of", "pairwise_cover"]

TIMES = 4  # a kernel that declines one cell of a pair is left with others
SEED = 0
FREE = (*TURNS, *(axis for axis in INPUT_AXES if axis not in TURNS))  # fit every layer
FIXED = tuple(axis for axis in AXES if axis not in FREE)
# Every value of every axis has a number, so that a cell is a row of numbers.
VALUES = [(axis, value) for axis in (*FIXED, *FREE) for value in AXES[axis]]

Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(cell: Cell) -> set[Pair]:
    """List the pairs of values that meet in a cell."""
    return set(combinations([(axis, getattr(cell, axis)) for axis in (*FIXED, *FREE)], 2))


def pairwise_cover(layers: Iterable[Cell], *, times: int = TIMES, seed: int = SEED) -> list[Cell]:
    """Cover every pair of values that a possible cell has; greedy, and the same every time.

    Args:
        layers: every possible layer.
        times: in how many different cells each pair is to meet.
        seed: what breaks ties.
    """
    random = np.random.default_rng(seed)
    number = {pair: index for index, pair in enumerate(VALUES)}
    rows = _unique([number[axis, getattr(layer, axis)] for axis in FIXED] for layer in layers)
    fillings = _unique(
        [number[axis, value] for axis, value in zip(FREE, values, strict=True)]
        for values in product(*(AXES[axis] for axis in FREE))
    )
    missing = _pairs_there_are(rows) * times  # [values, values], how often each pair is to meet
    cells: dict[tuple[int, ...], None] = {}
    while missing.any():
        # The layer that adds most, if each free axis could then take the best of its values.
        with_each = (missing[rows] > 0).sum(axis=1)  # [layers, values]
        gain = _gain(missing, rows) + random.random(len(rows))
        for axis in FREE:
            gain += with_each[:, [number[axis, value] for value in AXES[axis]]].max(axis=1)
        layer = rows[int(gain.argmax())]
        whole = np.concatenate([np.tile(layer, (len(fillings), 1)), fillings], axis=1)
        gain = _gain(missing, whole) + random.random(len(whole))
        best = next(
            cell
            for index in np.argsort(-gain)
            if (cell := tuple(whole[index].tolist())) not in cells
        )
        cells[best] = None
        for pair in combinations(best, 2):
            missing[pair] = max(missing[pair] - 1, 0)
    return [Cell(**dict(VALUES[index] for index in cell)) for cell in cells]


def _unique(rows: Iterable[list[int]]) -> NDArray[np.int64]:
    return np.unique(np.array(list(rows), dtype=np.int64), axis=0)


def _pairs_there_are(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Mark the pairs that a possible cell has: two values of a layer, or one that fits them all."""
    there_are = np.zeros((len(VALUES), len(VALUES)), dtype=np.int64)
    for first, second in combinations(range(len(FIXED)), 2):
        there_are[rows[:, first], rows[:, second]] = 1
    possible = set(rows.flat)
    for (i, (axis, _)), (j, (other, _)) in combinations(enumerate(VALUES), 2):
        fits = axis in FREE or i in possible
        there_are[i, j] |= int(axis != other and other in FREE and fits)
    return there_are


def _gain(missing: NDArray[np.int64], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Count the missing pairs that each row would add."""
    gain = np.zeros(len(rows))
    for first, second in combinations(range(rows.shape[1]), 2):
        gain += missing[rows[:, first], rows[:, second]] > 0
    return gain
