"""Tokens picked for many replies at a time are those that transformers' processors allow."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import gptq_loader_plugin as gptq
from gptq_loader_plugin.generation.batch_sampling import Row, pick_tokens
from gptq_loader_plugin.generation.sampling import Sampler

VOCABULARY = 60
CPU = torch.device("cpu")
DRAWS = 4000
OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 1, "top_k": 0, "top_p": 1},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 0, "top_p": 0.6},
    {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0.2},
    {"temperature": 0.8, "repetition_penalty": 1.5, "top_k": 12},
    {"temperature": 0.8, "repetition_penalty": 0.7},
    {"temperature": 2, "top_k": 60, "top_p": 0.05},
]
BANNED = (3, 59)


def logits_of(seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, VOCABULARY, generator=random) * 2
    logits[0, 7] = logits[0, 9]  # a tie
    return logits


def probabilities(sampler: Sampler, sequence: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return what transformers' processors make of the logits [vocabulary]."""
    found, ids = sampler.candidates(sequence, logits)
    whole = torch.zeros(VOCABULARY)
    whole[torch.arange(VOCABULARY) if ids is None else ids[0]] = found[0]
    return whole


@pytest.mark.parametrize("fields", OPTIONS, ids=str)
def test_draws_have_the_probabilities_of_transformers_processors(fields: dict[str, Any]) -> None:
    options = gptq.GenerateOptions(**fields, seed=5)
    sequence, logits = torch.tensor([[1, 2, 2, 30]]), logits_of(1)
    row = Row.of(options, BANNED, VOCABULARY, CPU)
    rows = [Row(options, row.banned, row.seed, num_sampled) for num_sampled in range(DRAWS)]
    picked = pick_tokens(rows, [sequence] * DRAWS, logits.expand(DRAWS, -1))
    counts = picked.bincount(minlength=VOCABULARY)
    sampler = Sampler(options, BANNED, CPU)
    if options.temperature == 0:
        assert picked.tolist() == [sampler.sample(sequence, logits)] * DRAWS
        return
    expected = probabilities(sampler, sequence, logits)
    assert not counts[expected == 0].any()
    wide = expected * DRAWS >= 5
    squares = ((counts - expected * DRAWS) ** 2 / (expected * DRAWS))[wide].sum()
    freedom = int(wide.sum()) - 1
    assert float(squares) < freedom + 4 * (2 * max(freedom, 1)) ** 0.5 + 4  # chi-squared, 4 sigma


def test_a_row_is_picked_alike_alone_and_beside_others() -> None:
    rows = [Row.of(gptq.GenerateOptions(**it, seed=i), BANNED, VOCABULARY, CPU)
            for i, it in enumerate(OPTIONS)]  # fmt: skip
    sequences = [torch.arange(1, 3 + i)[None] for i in range(len(rows))]
    logits = torch.cat([logits_of(i) for i in range(len(rows))])
    together = pick_tokens(rows, sequences, logits).tolist()
    alone = [
        int(pick_tokens([row], [sequence], logits[i : i + 1]))
        for i, (row, sequence) in enumerate(zip(rows, sequences, strict=True))
    ]
    assert together == alone
    assert logits.equal(torch.cat([logits_of(i) for i in range(len(rows))]))


def test_seeds_and_numbers_of_tokens_draw_independently() -> None:
    options = gptq.GenerateOptions(temperature=1, top_k=0, top_p=1)
    flat = torch.zeros(1, VOCABULARY)
    picked = {}
    for seed, num_sampled in itertools.product((0, 1, 2, -1, 2**63, 2**64 - 1), range(40)):
        row = Row.of(
            gptq.GenerateOptions(**options.model_dump() | {"seed": seed}), (), VOCABULARY, CPU
        )
        row.num_sampled = num_sampled
        picked[seed, num_sampled] = int(pick_tokens([row], [torch.tensor([[1]])], flat))
    repeated = sum(picked[0, i] == picked[1, i] for i in range(40))
    assert repeated < 8
    assert len({picked[0, i] for i in range(40)}) > 20
    unseeded = {Row.of(options, (), VOCABULARY, CPU).seed for _ in range(20)}
    assert len(unseeded) == 20
