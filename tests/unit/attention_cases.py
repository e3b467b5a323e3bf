"""Pools of blocks with sequences in them, and attention over them in float64, to compare with.

As a program it checks every case as the environment has it: with TRITON_INTERPRET=1, the kernels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch

from gptq_loader_kernels.attention import paged_attention, write_cache
from gptq_loader_kernels.attention.torch_attention import CODE_LIMITS

OUTSIDE = 1 << 20  # a block that no pool has
# Of the largest value: outputs and, by tensor cores, the weights are rounded to the dtype.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True, slots=True)
class Case:
    lengths: tuple[int, ...] = (0, 1, 15, 16, 17, 40)
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    value_dim: int | None = None
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    scales_dtype: torch.dtype = torch.float16
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    shared: int = 0  # blocks at the front of all sequences
    seed: int = 0

    def __str__(self) -> str:
        parts = (
            self.heads,
            self.kv_heads,
            self.dim,
            self.value_dim,
            self.block_size,
            self.dtype,
            self.cache_dtype,
            self.window,
            self.softcap,
            self.sinks,
            self.shared,
        )
        return "-".join(str(it).removeprefix("torch.") for it in parts)


def made(case: Case) -> dict[str, Any]:
    """Fill a pool through write_cache; what no sequence may read is not a number."""
    random = torch.Generator().manual_seed(case.seed)
    value_dim = case.value_dim or case.dim
    blocks = [-(-it // case.block_size) for it in case.lengths]
    pool = sum(blocks) + 2
    ids = (torch.randperm(pool - 1, generator=random) + 1).tolist()  # block 0 is nobody's
    tables = torch.full((len(blocks), max(blocks) + 1), OUTSIDE, dtype=torch.int32)
    front = [ids.pop() for _ in range(case.shared)]
    for row, count in enumerate(blocks):
        own = (front + [ids.pop() for _ in range(max(0, count - case.shared))])[:count]
        tables[row, :count] = torch.tensor(own, dtype=torch.int32)
    cache_dtype = case.cache_dtype or case.dtype
    eight = cache_dtype in CODE_LIMITS
    key_cache = emptied((pool, case.block_size, case.kv_heads, case.dim), cache_dtype)
    value_cache = emptied((pool, case.block_size, case.kv_heads, value_dim), cache_dtype)
    scales = [emptied(key_cache.shape[:3], case.scales_dtype) if eight else None for _ in range(2)]
    slots = []
    for row, length in enumerate(case.lengths):
        for position in range(length):
            block, offset = divmod(position, case.block_size)
            if row == 0 or block >= case.shared or case.lengths[row - 1] <= position:
                slots.append(int(tables[row, block]) * case.block_size + offset)
    slots = sorted(set(slots))
    order = torch.randperm(len(slots) + 3, generator=random)
    slots = torch.tensor([*slots, -1, -1, -7], dtype=torch.int64)[order]
    keys = torch.randn(len(slots), case.kv_heads, case.dim, generator=random).to(case.dtype)
    values = torch.randn(len(slots), case.kv_heads, value_dim, generator=random).to(case.dtype)
    write_cache(
        keys, values, key_cache, value_cache, slots, key_scales=scales[0], value_scales=scales[1]
    )
    query = torch.randn(len(blocks), case.heads, case.dim, generator=random).to(case.dtype)
    if case.window is not None:  # a block before the window may have been freed
        for row, length in enumerate(case.lengths):
            tables[row, : max(0, length - case.window) // case.block_size] = -1
    return {
        "query": query, "key_cache": key_cache, "value_cache": value_cache,
        "block_tables": tables, "lengths": torch.tensor(case.lengths, dtype=torch.int32),
        "scale": case.dim**-0.5, "window": case.window, "softcap": case.softcap,
        "sinks": torch.randn(case.heads, generator=random).to(case.dtype) if case.sinks else None,
        "key_scales": scales[0], "value_scales": scales[1],
        "written": (slots, keys, values),
    }  # fmt: skip


def emptied(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.full(shape, 111, dtype=dtype)
    return torch.full(shape, torch.nan).to(dtype)


def expected(pool: dict[str, Any], *, exact: bool = False) -> torch.Tensor:
    """Attend in float64, a sequence and a head at a time: to what the cache holds, or held."""
    query, lengths = pool["query"].double(), pool["lengths"].tolist()
    keys, values = (cached(pool, it, exact=exact) for it in ("key", "value"))
    size, group = keys.shape[1], query.shape[1] // keys.shape[2]
    result = torch.zeros(query.shape[0], query.shape[1], values.shape[3], dtype=torch.float64)
    for row, length in enumerate(lengths):
        start = 0 if pool["window"] is None else max(0, length - pool["window"])
        at = [
            (int(pool["block_tables"][row, it // size]), it % size) for it in range(start, length)
        ]
        for head in range(query.shape[1] if at else 0):
            k = torch.stack([keys[block, offset, head // group] for block, offset in at])
            v = torch.stack([values[block, offset, head // group] for block, offset in at])
            scores = (k @ query[row, head]) * pool["scale"]
            if pool["softcap"] is not None:
                scores = torch.tanh(scores / pool["softcap"]) * pool["softcap"]
            if pool["sinks"] is not None:
                scores = torch.cat([scores, pool["sinks"][head, None].double()])
            result[row, head] = torch.softmax(scores, 0)[: len(at)] @ v
    return result


def cached(pool: dict[str, Any], name: str, *, exact: bool) -> torch.Tensor:
    cache, scales = pool[f"{name}_cache"], pool[f"{name}_scales"]
    held = cache.double() if scales is None else cache.double() * scales.double()[..., None]
    if exact:
        slots, *written = pool["written"]
        held = torch.full_like(held, torch.nan)
        kept = slots >= 0
        held.flatten(0, 1)[slots[kept]] = written[name == "value"][kept].double()
    return held


def attended(pool: dict[str, Any]) -> torch.Tensor:
    return paged_attention(**{key: it for key, it in pool.items() if key != "written"})


def check(case: Case) -> None:
    pool = made(case)
    result = attended(pool)
    assert result.dtype == case.dtype
    for row, length in enumerate(case.lengths):
        assert length or not result[row].any(), "a row of padding is zeros"
    error = (result.double() - expected(pool)).abs().max() / expected(pool).abs().max()
    assert error < TOLERANCE[case.dtype], (str(case), float(error))


BASIC = [
    *(Case(heads=heads, kv_heads=kv) for heads, kv in ((1, 1), (3, 3), (4, 1), (8, 2), (8, 1))),
    *(Case(dim=dim, lengths=(33, 0, 7)) for dim in (8, 80, 96, 128, 256)),
    Case(dim=192, value_dim=128, lengths=(20,)), Case(dim=64, value_dim=80), Case(block_size=8),
    Case(block_size=32, lengths=(32, 64, 65, 1)), Case(block_size=24, lengths=(24, 25, 70)),
    *(Case(window=window) for window in (1, 8, 16, 17, 64)), Case(softcap=2.0), Case(sinks=True),
    Case(window=20, softcap=3.0, sinks=True, heads=8, lengths=(0, 50, 20, 21)), Case(shared=2),
    Case(lengths=(300, 129, 128, 257), heads=2, kv_heads=1, sinks=True),
    Case(lengths=(300, 129), heads=2, kv_heads=2, window=131),
]  # fmt: skip
HALF = [
    *(Case(dtype=dtype, heads=heads, kv_heads=kv, dim=dim) for dtype, (heads, kv), dim in
      zip(itertools.cycle((torch.float16, torch.bfloat16)),
          ((4, 4), (4, 4), (8, 2), (8, 2), (8, 1), (8, 1)), (128, 64, 80, 96, 64, 256),
          strict=False)),
    Case(dtype=torch.float16, dim=192, value_dim=128, lengths=(33,), window=9, softcap=5.0),
]  # fmt: skip
EIGHT = [
    Case(cache_dtype=torch.int8), Case(cache_dtype=torch.int8, heads=2),
    Case(cache_dtype=torch.int8, scales_dtype=torch.float32, dim=80, window=9, sinks=True),
    Case(cache_dtype=torch.int8, dtype=torch.float16, heads=8, dim=96, lengths=(33, 0, 150)),
    Case(cache_dtype=torch.int8, dtype=torch.bfloat16, heads=2, scales_dtype=torch.float32),
]  # fmt: skip
FLOAT8 = [replace(it, cache_dtype=torch.float8_e4m3fn) for it in EIGHT]


def check_batches() -> None:
    """A sequence's output is the same to the last bit alone, and by a wider table."""
    pool = made(Case(lengths=(300, 129, 64, 0, 700), heads=2, kv_heads=1, dim=16, sinks=True))
    result = attended(pool)
    wider = torch.nn.functional.pad(pool["block_tables"], (0, 100), value=OUTSIDE)
    assert torch.equal(attended({**pool, "block_tables": wider}), result)
    for row in range(5):
        alone = {key: pool[key][row, None] for key in ("query", "block_tables", "lengths")}
        assert torch.equal(attended({**pool, **alone})[0], result[row]), row


def main() -> None:
    cases = (*BASIC, *HALF, *EIGHT, *FLOAT8)
    for case in cases:
        check(case)
    check_batches()
    print(len(cases))  # noqa: T201 - what the test reads


if __name__ == "__main__":
    main()
