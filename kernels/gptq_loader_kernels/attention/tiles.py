"""How attention is cut up for a GPU, from shapes alone, never from lengths. No imports.

Positions of a sequence are shared among programs in chunks that depend on its length, on the GPU
and on the heads, and on no other sequence: so a sequence's output is the same to the last bit in
every batch. The number of programs is the table's, which a graph fixes.

Every tile is compiled ahead of time for every GPU that may take it (docs/kernels/attention.md).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "CHUNK",
    "COLUMNS",
    "MAX_SPLITS",
    "Tile",
    "norm_warps",
    "power_of_two",
    "splits",
    "tile_of",
]

CHUNK = 128  # positions that one program attends to at least: a smaller part costs as much to add
PROGRAMS = 2  # for each multiprocessor that one sequence is shared among
MAX_SPLITS = 64  # for the longest sequence; more parts cost as much to add up as they save
MAX_ROWS = 32  # query heads in a program, by tensor cores
LANE_ROWS = 8  # as many without, each of which keeps sums of its own

STEP = 32  # positions: two steps of 128 numbers, with values, fit sm86 for two programs
COLUMNS = 1024  # of an activation that one program takes
SUMS = 8192  # that a program without tensor cores keeps, 64 of each thread


@dataclass(frozen=True, slots=True)
class Tile:
    """One way to attend.

    Attributes:
        cores: whether tensor cores multiply.
        rows: query heads of a program, padded to a power of two.
        positions: positions taken in one step.
        warps: warps that share a program.
        stages: steps whose loads are in flight.
    """

    cores: bool
    rows: int
    positions: int
    warps: int
    stages: int


def power_of_two(number: int) -> int:
    """Round up to a power of two."""
    return 1 << (number - 1).bit_length()


def tile_of(group: int, dim: int, *, cores: bool, amd: bool = False) -> Tile:
    """Choose the tile.

    Args:
        group: query heads of a head of keys.
        dim: the larger dimension of keys and values.
        cores: whether the GPU has tensor cores for the query's dtype.
        amd: whether it is AMD's, where steps in flight take registers until they spill.
    """
    dim = power_of_two(dim)
    if cores and group > 1 and not (amd and dim > 128):  # which spills on gfx1100
        rows = max(16, min(power_of_two(group), MAX_ROWS))
        return Tile(cores=True, rows=rows, positions=STEP, warps=4, stages=1 if amd else 5)
    rows = min(power_of_two(group), LANE_ROWS)
    positions = max(4, min(32, SUMS // (rows * dim)))
    return Tile(cores=False, rows=rows, positions=positions, warps=4, stages=1)


def splits(kv_heads: int, max_positions: int, multiprocessors: int) -> int:
    """Count the programs that share a sequence's positions."""
    enough = -(-PROGRAMS * multiprocessors // kv_heads)
    return max(1, min(MAX_SPLITS, enough, -(-max_positions // CHUNK)))


def norm_warps(size: int) -> int:
    """Choose the warps that share a row of a norm: 16 numbers a thread, or more."""
    return max(1, min(16, power_of_two(size) // 512))
