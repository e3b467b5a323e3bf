"""Attention over a pool of blocks: against float64, in plain torch and by Triton's interpreter."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import BASIC, EIGHT, FLOAT8, HALF, Case, attended, check, expected, made
from processes import run_process

from gptq_loader_kernels.attention import paged_attention, write_cache
from gptq_loader_kernels.attention.torch_attention import quantize

CASES = Path(__file__).parent / "attention_cases.py"
SLOW = 900  # seconds: Triton's interpreter or compiler, on a machine with other work
AOT = Path(__file__).parents[2] / "bench" / "attention_aot.py"


@pytest.mark.parametrize("case", [*BASIC, *HALF, *EIGHT, *FLOAT8], ids=str)
def test_it_attends_to_what_the_pool_holds(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-5, 1.0, 3e4])
def test_a_value_in_8_bits_is_off_by_half_a_scale_at_most(
    size: float, scales_dtype: torch.dtype
) -> None:
    values = torch.randn(64, 4, 96, generator=torch.Generator().manual_seed(0)) * size
    codes, scales = quantize(values, torch.int8, scales_dtype)
    assert (codes.dtype, scales.dtype) == (torch.int8, scales_dtype)
    error = (codes.double() * scales.double()[..., None] - values.double()).abs()
    largest = values.abs().amax(dim=-1, keepdim=True)
    assert bool((error <= largest.clamp(min=0.0078) / 253).all())


def test_an_8_bit_cache_keeps_attention_within_its_bound() -> None:
    case = Case(cache_dtype=torch.int8, lengths=(1, 60, 33), dim=128)
    pool = made(case)
    _, keys, values = pool["written"]
    # of a score: |q|_1 times the error of a key; of a weight: its factor; and that of a value
    score = pool["scale"] * pool["query"].abs().sum(-1).max() * keys.abs().max() / 253
    bound = values.abs().max() * (torch.exp(2 * score) - 1) + values.abs().max() / 253
    error = (attended(pool).double() - expected(pool, exact=True)).abs().max()
    assert error < bound
    assert error < 0.02  # as it is, far below


def test_a_cache_in_8_bits_needs_its_scales() -> None:
    cache = torch.zeros(1, 4, 1, 8, dtype=torch.int8)
    new = torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="scales"):
        write_cache(new, new, cache, cache.clone(), torch.tensor([0]))


def test_padding_writes_nothing() -> None:
    caches = [torch.full((2, 4, 1, 8), 7.0) for _ in range(2)]
    new = torch.zeros(3, 1, 8)
    write_cache(new, new, caches[0], caches[1], torch.tensor([-1, -5, -1]))
    write_cache(new[:0], new[:0], caches[0], caches[1], torch.tensor([], dtype=torch.int64))
    assert all(bool((it == 7).all()) for it in caches)


def test_no_sequences_and_no_blocks_are_nothing() -> None:
    cache = torch.zeros(2, 4, 1, 8)
    tables, lengths = torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    result = paged_attention(torch.ones(1, 2, 8), cache, cache, tables, lengths, scale=1.0)
    assert result.shape == (1, 2, 8)
    assert not result.any()
    result = paged_attention(
        torch.ones(0, 2, 8), cache, cache, tables.new_zeros(0, 3), lengths[:0], scale=1.0
    )
    assert result.shape == (0, 2, 8)


def test_the_kernels_do_so_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    done = run_process(
        [sys.executable, "-W", "ignore", str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        seconds=SLOW,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(len((*BASIC, *HALF, *EIGHT, *FLOAT8)))


def test_every_kind_of_kernel_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {key: it for key, it in os.environ.items() if key != "TRITON_INTERPRET"}
    done = run_process(
        [sys.executable, str(AOT), "--fast", "--jobs", "1"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        seconds=SLOW,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "6 configurations, 0 of them against a gate" in done.stdout
