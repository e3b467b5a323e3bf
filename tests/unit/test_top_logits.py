"""A head that gives its greatest logits alone: these are exact, and none of them is missing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from altered import DATA, ONE, plugins
from native_codes import EXACT_CODES, Code
from test_native_step import FAMILIES, build

import gptq_loader_plugin as gptq
from gptq_loader_kernels.cpu import DECODERS, CpuKernel
from gptq_loader_kernels.cpu.library import find_library
from gptq_loader_plugin.generation.sampling import Sampler
from gptq_loader_plugin.generation.top_logits import top_logits_head
from gptq_loader_plugin.kernel import TopLogitsHead

pytestmark = pytest.mark.skipif(find_library() is None, reason="the native library was not built")

TYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def make_head(weight: torch.Tensor, code: Code | tuple[()] = ()) -> Any:
    from gptq_loader_kernels.cpu.head import TopLogitsLinear

    linear = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    linear.weight.data = weight
    return TopLogitsLinear.of(linear, *code)


def make_weight(columns: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of different lengths, many of them alike, so that the greatest are close and tie."""
    generator = torch.Generator().manual_seed(columns + rows)
    weight = torch.randn(columns, rows, generator=generator)
    weight *= torch.rand(columns, 1, generator=generator) + 0.5
    weight[1::7] = weight[0]
    weight[2::7] = weight[0] * (1 + 1e-3 * torch.randn(len(weight[2::7]), 1, generator=generator))
    weight[5] = 0
    weight[6, 3] = 40
    return weight.to(dtype)


def check(head: Any, x: torch.Tensor, needed: list[int], excluded: torch.Tensor | None) -> float:
    """Compare with all logits; give how many of them were left out."""
    with torch.inference_mode():
        exact = torch.cat([head(row[None]) for row in x])
        found = head.top_logits(x, needed, excluded)
    assert found is not None
    there = found > -torch.inf
    assert torch.equal(found[there], exact[there])
    for row, count in enumerate(needed):
        counted = (
            exact[row] if excluded is None else exact[row].masked_fill(excluded[row], -torch.inf)
        )
        least = counted.topk(count).values[-1]
        assert bool(there[row][exact[row] >= least].all())
    return 1 - float(there.float().mean())


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("code", EXACT_CODES)
@pytest.mark.parametrize(("columns", "rows"), [(4096, 64), (3400, 100), (6000, 576)])
def test_the_greatest_logits_are_exact_and_there(
    columns: int, rows: int, code: Code, dtype: torch.dtype
) -> None:
    head = make_head(make_weight(columns, rows, dtype), code)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(9, rows, generator=generator)
    x[0, 3] = 1000  # an outlier
    x[1] = head.weight[0].float()  # many tie, and more are as near as can be
    x[2] = 1e-30
    x = x.to(dtype)
    excluded = torch.rand(9, columns, generator=generator) < 0.1
    for needed in ([1] * 9, [1, 2, 50, 5, 1, 7, 20, 3, 1]):
        check(head, x, needed, None)
        check(head, x, needed, excluded)
    plain = torch.randn(4, rows, generator=generator).to(dtype)
    assert check(head, plain, [1] * 4, None) > 0.5, "it reads little of the head"


def test_it_says_when_it_cannot_tell() -> None:
    head = make_head(make_weight(4096, 64, torch.float32))
    x = torch.randn(1, 64)
    with torch.inference_mode():
        assert head.top_logits(x, [65]) is None, "more than there are tiles"
        assert head.top_logits(x * torch.nan, [1]) is None
        assert head.top_logits(x * torch.inf, [1]) is None
        assert head.top_logits(x.bfloat16(), [1]) is None
        assert head.top_logits(x, [1]) is not None
    copied = copy.deepcopy(head)
    with torch.no_grad():
        head.weight.mul_(2)
    assert head.top_logits(x, [1]) is None, "the weight is another one now"
    check(copied, x, [1], None)


def test_another_default_dtype_changes_nothing() -> None:
    """transformers sets it, for the whole process, while another thread loads a model."""
    weight = make_weight(4096, 64, torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        head = make_head(weight)
    finally:
        torch.set_default_dtype(torch.float32)
    assert head.errors.dtype == torch.float32
    check(head, torch.randn(3, 64).bfloat16(), [1, 5, 50], None)


SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.4},
    {"temperature": 0.8, "top_k": 4, "seed": 5},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 6},
    {"temperature": 1, "top_k": 6, "min_p": 0.02, "seed": 7},
    {"temperature": 1, "top_k": 0, "seed": 8},
    {"temperature": 1, "top_k": 4, "repetition_penalty": 0.8, "seed": 9},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
def test_replies_are_those_of_the_whole_head(options: dict[str, Any]) -> None:
    how = gptq.GenerateOptions(max_new_tokens=40, **options)
    with gptq.load(DATA / ONE, device="cpu", head="stored", plugins=plugins()) as model:
        assert not isinstance(model.model.get_output_embeddings(), TopLogitsHead)
        expected = model.generate("The quick brown", how)
    with gptq.load(DATA / ONE, device="cpu", plugins=plugins()) as model:
        assert isinstance(model.model.get_output_embeddings(), TopLogitsHead)
        assert "by a copy of the head in 8 bits" in model.explain()
        assert model.generate("The quick brown", how) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_change_their_heads_logits_keep_it(family: str) -> None:
    model = build(family)
    head = model.get_output_embeddings()
    with torch.inference_mode():
        ids = torch.tensor([[5, 7, 11]])
        own, of_head = model(ids).logits, head(model.base_model(ids).last_hidden_state)
    if type(model).__name__ in DECODERS:
        assert torch.equal(own, of_head)
    else:
        assert CpuKernel().add_top_logits(model) == 0


def test_tokens_that_are_never_picked_do_not_count() -> None:
    """What a sampler needs of a short head picks as the whole head does, padding left out."""
    head = make_head(make_weight(4096, 64, torch.float32))
    with torch.inference_mode():
        for seed in range(20):
            x = torch.randn(1, 64, generator=torch.Generator().manual_seed(seed))
            best = head(x)[0].topk(30).indices.tolist()
            for options in ({"temperature": 0}, {"temperature": 1, "top_k": 9, "seed": seed}):
                how = gptq.GenerateOptions(repetition_penalty=1.5, **options)
                sequence = torch.tensor([best[2:20:3]])
                picks = [Sampler(how, best[:25:2], x.device) for _ in range(2)]
                excluded = picks[0].excluded(sequence, 4096)
                assert excluded is not None
                found = head.top_logits(x, [picks[0].needed_logits()], excluded[None])
                assert picks[0].sample(sequence, found) == picks[1].sample(sequence, head(x))


def test_a_head_that_is_not_short_is_not_taken_for_one() -> None:
    assert top_logits_head(build("llama")) is None


@pytest.mark.parametrize("head", [None, "stored"])
def test_the_plan_counts_the_copy(head: Any) -> None:
    with gptq.load(DATA / ONE, device="cpu", head=head, plugins=plugins()) as model:
        held = {it.data_ptr(): it.nbytes for it in model.model.parameters()}
        held |= {it.data_ptr(): it.nbytes for it in model.model.buffers()}
        short = model.model.get_output_embeddings()
        copied = short.extra_bytes if isinstance(short, TopLogitsHead) else 0
        assert (copied > 0) == (head is None)
        held_bytes = sum(held.values()) + copied
        assert model.plan.weight_bytes == pytest.approx(held_bytes, rel=0.03)
    if head is None:
        planned = gptq.explain(DATA / ONE, device="cpu", plugins=plugins())
        assert planned.weight_bytes == pytest.approx(held_bytes, rel=0.03)


def test_a_model_that_is_watched_is_called_whole() -> None:
    how = gptq.GenerateOptions(max_new_tokens=3, temperature=0)
    seen: list[object] = []
    with gptq.load(DATA / ONE, device="cpu", plugins=plugins()) as model:
        expected = model.generate("The", how)
        hook = model.model.register_forward_pre_hook(lambda *_: seen.append(None))
        assert model.generate("The", how) == expected
        hook.remove()
        assert model.generate("The", how) == expected
    assert len(seen) == 3
