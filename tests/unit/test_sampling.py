"""Picking tokens: the candidates against transformers' processors over the whole vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation import logits_process as process

from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.generation.sampling import Sampler

VOCABULARY = 500
NEVER = range(480, VOCABULARY)
SEQUENCE = torch.arange(0, 40)[None]


def transformers_probabilities(logits: torch.Tensor, options: GenerateOptions) -> torch.Tensor:
    """Run the processors one after the other, as transformers' generate does."""
    scores: Any = logits.float()
    steps = [
        process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
        process.SuppressTokensLogitsProcessor(list(NEVER), device="cpu"),
        process.TemperatureLogitsWarper(options.temperature),
    ]
    if options.top_k:
        steps.append(process.TopKLogitsWarper(options.top_k))
    steps.append(process.TopPLogitsWarper(options.top_p))
    if options.min_p:
        steps.append(process.MinPLogitsWarper(options.min_p))
    for step in steps:
        scores = step(SEQUENCE, scores)
    probabilities: torch.Tensor = scores.softmax(dim=-1)
    return probabilities


@pytest.mark.parametrize("rounding", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"top_k": 5},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 600, "min_p": 0.1},
        {"top_p": 0.5, "repetition_penalty": 1.3},
        {"temperature": 2.0, "top_p": 1.0, "min_p": 0.2},
    ],
)
def test_candidates_are_transformers_own(fields: dict[str, Any], rounding: torch.dtype) -> None:
    options = GenerateOptions.parse({"top_p": 0.95, **fields})
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        # Rounded to a step of a quarter, scores tie, among them the last ones of top_k.
        logits = (torch.randn(1, VOCABULARY, generator=generator) * 12).round().div(4).to(rounding)
        sampler = Sampler(options, NEVER, torch.device("cpu"))
        probabilities, ids = sampler.candidates(SEQUENCE, logits)
        whole = torch.zeros(1, VOCABULARY)
        whole.scatter_(1, torch.arange(VOCABULARY)[None] if ids is None else ids, probabilities)
        expected = transformers_probabilities(logits, options)
        # Among equals, where top_p cuts, the order of a sort decides which go.
        torch.testing.assert_close(whole.sort().values, expected.sort().values)
        level = logits.float().masked_fill(whole == 0, torch.inf).min()
        surely = expected * (logits.float() > level)
        torch.testing.assert_close(whole * (logits.float() > level), surely)


def test_a_greedy_pick_is_the_first_of_the_likeliest() -> None:
    logits = torch.zeros(1, VOCABULARY, dtype=torch.bfloat16)
    logits[0, [7, 300, 490]] = torch.tensor([2.0, 2.0, 3.0], dtype=torch.bfloat16)
    options = GenerateOptions(temperature=0)
    assert Sampler(options, (), torch.device("cpu")).sample(SEQUENCE, logits) == 490
    assert Sampler(options, NEVER, torch.device("cpu")).sample(SEQUENCE, logits) == 7


def test_picks_follow_the_probabilities() -> None:
    logits = torch.full((1, VOCABULARY), -20.0)
    logits[0, 3], logits[0, 9] = 0.0, torch.log(torch.tensor(3.0))
    options = GenerateOptions(temperature=1.0, top_p=1.0, top_k=40, seed=1)
    sampler = Sampler(options, NEVER, torch.device("cpu"))
    picked = [sampler.sample(SEQUENCE, logits) for _ in range(2000)]
    assert set(picked) == {3, 9}
    assert abs(picked.count(9) / len(picked) - 0.75) < 0.04


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_greedy_token_is_the_first_of_the_greatest(dtype: torch.dtype) -> None:
    sampler = Sampler(GenerateOptions(temperature=0), [], torch.device("cpu"))
    infinite = float("inf")
    for scores in (
        [1.0, 3.0, -2.0, 3.0], [-4.0, -1.5, -1.5, -9.0], [-1.0, 0.0, -0.0, -3.0],
        [-0.0, 0.0, -1.0, -1.0], [-infinite, -infinite, 2.0, 2.0],
        [-infinite, -7.0, -infinite, -7.0], [1.0, infinite, 2.0, infinite],
    ):  # fmt: skip
        logits = torch.tensor([scores]).to(dtype)
        right = int(logits.max(dim=-1).indices)
        assert sampler.sample(torch.tensor([[5]]), logits) == right, scores
