"""Packing from a checkpoint's words gives what packing from its codes would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_loader_kernels.cpu.library import (
    COLUMNS,
    find_library,
    held_bits,
    load_library,
    unit_rows,
)
from gptq_loader_plugin.kernel import PackedLinear
from gptq_loader_plugin.kernel.packing import pack_rows

pytestmark = pytest.mark.skipif(find_library() is None, reason="no native library was built")

WIDTHS = [
    *((bits, "continuous") for bits in (2, 3, 4, 8)),
    *((bits, "planar") for bits in range(2, 9)),
]
# rows, columns: whole tiles, a last tile filled up, less than one tile, many units
SHAPES = [(64, 128), (96, 72), (352, 40), (1024, 200)]


def packed_layer(
    bits: Any, layout: Any, rows: int, columns: int, groups: torch.Tensor
) -> tuple[PackedLinear, Any]:
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    count = int(groups.max()) + 1
    packed = PackedLinear(
        qweight=torch.from_numpy(pack_rows(codes, bits, layout)),
        zeros=torch.full((count, columns), 1 << (bits - 1), dtype=torch.uint8),
        scales=torch.ones(count, columns, dtype=torch.float16),
        g_idx=groups.to(torch.int32),
        bits=bits,
        layout=layout,
    )
    return packed, codes


def expected_words(codes: Any, rows: Any, held: int) -> Any:
    """Pack codes one by one, as gemv.h draws them."""
    size, tiles = unit_rows(held), -(-codes.shape[1] // COLUMNS)
    padded = np.zeros((len(codes) + 1, tiles * COLUMNS), dtype=np.uint32)  # row -1 is zeros
    padded[:-1, : codes.shape[1]] = codes
    units = padded[rows].reshape(-1, size, tiles, COLUMNS)
    words = np.zeros((tiles, len(units), 3 if held == 3 else 1, COLUMNS), dtype=np.uint32)
    for row in range(size):
        code = units[:, row].transpose(1, 0, 2)
        if held != 3:
            words[:, :, 0] |= code << np.uint32(held * row)
            continue
        half, place = divmod(row, 16)
        words[:, :, half] |= (code & 3) << np.uint32(2 * place)
        words[:, :, 2] |= (code >> 2) << np.uint32(place // 4 * 8 + half * 4 + place % 4)
    return words.view(np.int32)


def check(
    bits: int, layout: str, rows: int, columns: int, groups: torch.Tensor, threads: int
) -> None:
    from gptq_loader_kernels.cpu.linear import NativeLinear

    packed, codes = packed_layer(bits, layout, rows, columns, groups)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        module: Any = NativeLinear(packed, in_features=rows, out_features=columns)
    finally:
        torch.set_num_threads(before)
    assert sorted(it for it in module.rows.tolist() if it >= 0) == list(range(rows))
    expected = expected_words(codes, module.rows.numpy(), held_bits(bits))
    np.testing.assert_array_equal(module.words.numpy(), expected)


@pytest.mark.parametrize(("bits", "layout"), WIDTHS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda it: f"{it[0]}x{it[1]}")
@pytest.mark.parametrize("order", ["sequence", "shuffled", "one-group"])
def test_every_width_and_order(bits: int, layout: str, shape: tuple[int, int], order: str) -> None:
    rows, columns = shape
    groups = torch.arange(rows) // (rows if order == "one-group" else 32)
    if order == "shuffled":
        groups = groups[torch.randperm(rows, generator=torch.Generator().manual_seed(0))]
    check(bits, layout, rows, columns, groups, threads=2)


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from(WIDTHS),
    blocks=st.integers(1, 12),
    columns=st.integers(1, 150),
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=9),
    shuffled=st.booleans(),
    threads=st.integers(1, 3),
)
def test_uneven_groups(
    width: tuple[int, str],
    blocks: int,
    columns: int,
    sizes: list[int],
    shuffled: bool,
    threads: int,
) -> None:
    rows = 32 * blocks
    ends = torch.tensor(sizes).cumsum(0)
    groups = torch.searchsorted(ends, torch.arange(rows), right=True)
    if shuffled:
        groups = groups[torch.randperm(rows, generator=torch.Generator().manual_seed(rows))]
    check(*width, rows, columns, groups, threads)


def test_rows_that_fill_no_block() -> None:
    """At 4 bits 40 rows are five words; a block of 32 codes is not whole."""
    check(4, "continuous", 40, 70, torch.arange(40) // 16, threads=1)
    check(2, "continuous", 48, 70, torch.arange(48).flip(0) // 16, threads=1)
    check(8, "continuous", 20, 70, torch.arange(20).flip(0) // 8, threads=1)


def test_it_says_when_memory_is_short() -> None:
    """A copy of one tile of a layer of 2**56 rows cannot be had."""
    library = load_library()
    rows = torch.tensor([1, 0, *[-1] * 6], dtype=torch.int32)
    words, word = torch.zeros(COLUMNS, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    failed = library.gptq_pack(
        4, 0, word.data_ptr(), rows.data_ptr(), 1 << 56, 1, 1, words.data_ptr(), 1
    )
    assert failed == 1
