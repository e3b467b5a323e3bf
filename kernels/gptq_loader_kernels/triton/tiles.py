"""Which tile multiplies how many rows of x: the defaults, and what tuning may choose.

Imports nothing heavy. Every tile here is compiled ahead of time for every GPU that may take it, at
every width and group size, and must keep within the GPU's registers and shared memory
(docs/kernels/triton.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gptq_loader_kernels.triton.shape import unit_rows

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import Device

__all__ = [
    "BUCKETS",
    "Kind",
    "Tile",
    "bucket",
    "buckets",
    "candidates",
    "default_tiles",
    "expert_tiles",
    "fit",
    "fit_units",
    "has_tensor_cores",
    "kind_of",
]

Kind = tuple[int, int] | str  # of a GPU: CUDA's compute capability, or ROCm's architecture
INTERPRETED = (8, 0)  # what an interpreted kernel runs as, on a CPU that names no kind
OLDEST = (7, 0)  # that has any
AMPERE = (8, 0)  # the first whose tensor cores Triton uses

BUCKETS = (8, 16, 32, 64, 1 << 30)  # a tile is chosen for this many rows of x, or fewer
ROW_BUCKETS = (1, 2, 4, 8, 1 << 30)  # the same without tensor cores, where every row costs
MAX_PARTS = 16  # partial sums: beyond, adding them up costs as much as they save
DEPTHS = (256, 64)  # the least at 3 bits, a unit; the most at 8, as many bytes as 128 rows of 4
MAX_SPANS = 4  # groups in a tile's depth: more take minutes to compile


@dataclass(frozen=True, slots=True)
class Tile:
    """One way to cut the product up.

    Attributes:
        block_m: rows of x in a tile.
        block_n: columns of the weight in a tile.
        block_k: rows of the weight taken in one step, as far as `fit` leaves them.
        warps: warps that share a tile.
        stages: steps whose loads are in flight.
        waves: programs for each multiprocessor that splitting K aims at; 0 never splits it.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    waves: int = 0

    def parts(self, rows: int, columns: int, steps: int, multiprocessors: int) -> int:
        """Say among how many programs the rows of the weight are shared."""
        tiles = -(-rows // self.block_m) * -(-columns // self.block_n)
        return max(1, min(self.waves * multiprocessors // tiles, MAX_PARTS, steps))


# Few rows: the weight's bytes are all the time there is, so K is split until every multiprocessor
# has several programs with loads in flight. Many rows: the tensor cores are, and tiles grow until
# registers run out. On Hopper sums and products are asynchronous and a
# tile of 128 x 128 fits; elsewhere it spills. Not measured: no GPU was at hand.
FEW = {
    8: (Tile(8, 64, 128, 4, 4, 4), Tile(8, 32, 128, 2, 4, 8)),
    16: (Tile(16, 64, 128, 4, 4, 4), Tile(16, 32, 128, 2, 4, 8)),
    32: (Tile(32, 64, 128, 4, 4, 2), Tile(16, 64, 128, 4, 4, 4)),
}
MANY = (Tile(64, 128, 128, 8, 3), Tile(64, 64, 128, 4, 3), Tile(32, 64, 128, 4, 4, 2))
LARGE = Tile(128, 128, 64, 8, 3)
ASYNCHRONOUS = ((9, 0),)  # with wgmma; on sm100, groups of 16 rows leave LARGE without tensor cores
# What spills (bench/triton_aot.py): the first of MANY on sm80, at 8 bits of bfloat16 in groups of
# 32; the second on sm120, at 3 bits and in groups of 32.
SPILLING = {(8, 0): {8: MANY[0]}, (12, 0): dict.fromkeys((2, 3, 4, 8), MANY[1])}


# Without tensor cores: a thread takes four columns of one or two rows of words, and has a sum for
# each and every row of x. Eight warps share a tile where one row of words is all that registers
# have room for; on AMD's gfx9, whose warps are of 64 threads, four are as many.
ROWS = {
    1: (Tile(1, 128, 128, 4, 1, 8), Tile(1, 128, 128, 4, 1, 4)),
    2: (Tile(2, 128, 128, 4, 1, 8), Tile(2, 128, 128, 4, 1, 4)),
    4: (Tile(4, 128, 64, 4, 1, 4), Tile(4, 128, 64, 8, 1, 4)),
    8: (Tile(8, 128, 64, 8, 1, 4), Tile(8, 128, 64, 8, 1, 2)),
    1 << 30: (Tile(16, 128, 64, 8, 1, 2), Tile(8, 128, 64, 8, 1, 4)),
}


def kind_of(device: Device) -> Kind:
    """Return the kind of a GPU, which tiles and crossovers go by."""
    return device.arch or device.capability or INTERPRETED


def has_tensor_cores(kind: Kind) -> bool:
    """Whether the tiles of this kind of GPU multiply by tensor cores."""
    return not isinstance(kind, str) and kind >= AMPERE


def buckets(kind: Kind) -> tuple[int, ...]:
    """Return the numbers of rows that a tile is chosen for on one kind of GPU."""
    return BUCKETS if has_tensor_cores(kind) else ROW_BUCKETS


def bucket(rows: int, among: tuple[int, ...]) -> int:
    """Return the bucket that `rows` rows of x fall in."""
    return next(bucket for bucket in among if rows <= bucket)


def candidates(kind: Kind, bits: int, bucket: int) -> tuple[Tile, ...]:
    """List the tiles for one width and bucket on one kind of GPU, the default first."""
    if isinstance(kind, str) and kind.startswith("gfx9"):
        # 16 rows spill at 3 bits (gfx90a, groups of 64): a unit's words are three times as many.
        offered = [it for it in ROWS[bucket] if bits != 3 or it.block_m < 16]
        return tuple(dict.fromkeys(replace(it, warps=4) for it in offered))
    if isinstance(kind, str) or not has_tensor_cores(kind):
        return ROWS[bucket]
    if bucket in FEW:
        return FEW[bucket]
    spilling = SPILLING.get(kind, {}).get(bits)
    middle, last = tuple(it for it in MANY[:2] if it != spilling), MANY[2:]
    if bucket == 64:
        return (*reversed(middle), *last)
    large = kind in ASYNCHRONOUS and bits != 3  # whose units are too deep for it
    return (LARGE, *middle) if large else middle


def default_tiles(kind: Kind, bits: int) -> tuple[Tile, ...]:
    """Return the tile of each bucket that is used without tuning."""
    return tuple(candidates(kind, bits, bucket)[0] for bucket in buckets(kind))


def expert_tiles(kind: Kind, bits: int) -> tuple[Tile, ...]:
    """Return the tiles of a mixture's experts, by how many rows an expert has: `ROW_BUCKETS`.

    They have no tensor cores, as an expert has few of the rows of a decoding step.
    """
    plain = kind if isinstance(kind, str) else OLDEST
    tiles = tuple(candidates(plain, bits, bucket)[0] for bucket in ROW_BUCKETS)
    if bits == 3 and isinstance(kind, str) and not kind.startswith("gfx9"):
        return tuple(replace(it, warps=8) for it in tiles)  # four spill: gfx1100, two rows or four
    return tiles


def fit(tile: Tile, bits: int, group_shift: int) -> tuple[int, int]:
    """Fit a tile to a layer: the depth of a step, and the rows of it that share a group."""
    depth = max(tile.block_k, DEPTHS[0]) if bits == 3 else tile.block_k
    depth = min(depth, DEPTHS[1]) if bits == 8 else depth
    span = min(1 << group_shift, depth)
    return min(depth, MAX_SPANS * span), span


def fit_units(tile: Tile, bits: int, group_shift: int) -> tuple[int, int]:
    """Fit a tile without tensor cores to a layer: its depth is of whole units."""
    depth = max(tile.block_k, unit_rows(bits))
    return depth, min(1 << group_shift, depth)
