"""Keys and values in 8 bits, where they are asked for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from altered import DATA, ONE, plugins
from native_codes import EXACT_CODES, Code
from test_native_step import FAMILIES, build, install
from transformers import DeepseekV3Config, Qwen3NextConfig

import gptq_loader_plugin as gptq
from gptq_loader_kernels.cpu.library import Isa, find_library
from gptq_loader_plugin.generation.cache_layers import Int8Layer
from gptq_loader_plugin.generation.kv_cache import check_int8, make_cache, make_int8_cache

FIRST = 40  # tokens read at once
native = pytest.mark.skipif(find_library() is None, reason="the native library was not built")


def tokens(count: int) -> torch.Tensor:
    """Draw tokens [1, count]."""
    return torch.randint(0, 300, (1, count), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def steps(model: Any, cache: Any, ids: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """Read FIRST tokens at once and the others in steps; give the logits of all."""
    from gptq_loader_kernels.cpu.decoder import CACHE

    parts = ids.split((FIRST, *sizes), dim=1)
    logits = [model(input_ids=it, use_cache=True, **{CACHE: cache}).logits for it in parts]
    return torch.cat(logits, dim=1).float()


def test_it_is_near_and_takes_what_is_planned() -> None:
    with gptq.load(DATA / ONE, device="cpu", kv_cache="int8", plugins=plugins()) as loaded:
        ids, sizes = tokens(FIRST + 10), (1,) * 10
        cache = make_int8_cache(loaded.model)
        found = steps(loaded.model, cache, ids, sizes)
        expected = steps(loaded.model, make_cache(loaded.model), ids, sizes)
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.02
        layers: list[Any] = cache.layers
        room = sum(it.room.nbytes + it.scales.nbytes for it in layers)
        assert loaded.plan.kv_bytes_per_token == room / layers[0].room.shape[3]
        options = gptq.GenerateOptions(max_new_tokens=6, temperature=0)
        first = loaded.generate("Hello", options)
        assert loaded.generate("Hello", options) == first
        assert "keeps keys and values in 8 bits" in loaded.explain()


def test_a_number_is_off_by_half_a_code_at_most() -> None:
    layer = Int8Layer()
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 3, 700, 32)
    keys[0, 0, 5] = 0
    for part in range(0, 700, 90):
        layer.update(keys[:, :, part : part + 90], values[:, :, part : part + 90])
    for got, expected in ((layer.keys, keys), (layer.values, values)):
        assert got is not None
        step = expected.abs().amax(dim=-1, keepdim=True) / 127
        assert bool(((got - expected).abs() <= step * 0.501).all())
    before = layer.keys
    assert before is not None
    layer.crop(-100)
    assert layer.keys is not None
    assert torch.equal(layer.keys, before[:, :, :600])
    layer.keys, layer.values = keys[:, :1], values[:, :1]  # as transformers picks sequences
    assert layer.keys.shape == (1, 1, 700, 32)
    assert layer.values is not None
    assert bool(((layer.values - values[:, :1]).abs() < 0.02).all())
    layer.reset()
    assert (layer.get_seq_length(), layer.keys) == (0, None)


@native
@pytest.mark.parametrize(
    "family", sorted({"llama", "gemma2", "mistral-48", "phi-80", "qwen3-112", "gpt_oss"})
)
def test_a_step_answers_as_transformers_does_of_the_same_codes(family: str) -> None:
    assert family in FAMILIES
    model = build(family)
    ids, sizes = tokens(300), (1, 1, 2, 8, 5, 1, *(8,) * 30, 2)
    expected = steps(model, make_int8_cache(model), ids, sizes)
    step = install(model)
    before = step.steps
    cache = make_int8_cache(model)
    got = steps(model, cache, ids, sizes)
    assert step.steps - before == len(sizes)
    assert all(type(layer) is Int8Layer and layer.length == 300 for layer in cache.layers)
    # Codes are chosen of numbers that differ in the last bits: some of them are others.
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    assert float((got - expected).norm() / expected.norm()) < 2e-3


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("code", EXACT_CODES)
def test_the_code_for_every_processor_answers_alike(code: Code, dtype: torch.dtype) -> None:
    from gptq_loader_kernels.cpu.decoder import NativeDecoder

    isa, activations = code
    ids, sizes = tokens(FIRST + 20), (1, 8, 1, 4, 1, 3, 2)
    exact = build("mistral")
    expected = steps(exact, make_cache(exact), ids, sizes)
    model = build("mistral", dtype=dtype)
    plain = steps(model, make_cache(model), ids, sizes)
    decoder = NativeDecoder(model.model, isa=isa, activations=activations)
    model.model.forward = decoder.forward
    got = steps(model, make_int8_cache(model), ids, sizes)
    assert decoder.steps == len(sizes)
    assert decoder.prompts == (1 if isa == Isa.AVX512_BF16 and dtype == torch.bfloat16 else 0)
    allowed = float((plain - expected).norm()) + 0.01 * float(expected.norm())
    assert float((got - expected).norm()) < 1.2 * allowed


@native
def test_sequences_of_one_step_answer_as_each_alone() -> None:
    model = build("llama", dtype=torch.bfloat16)
    step = install(model)
    ids = [tokens(count)[0].tolist() for count in (150, 7, 33)]

    def read(sequence: list[int]) -> Any:
        cache = make_int8_cache(model)
        for begin, end in pairwise((*range(0, len(sequence), 8), len(sequence))):
            assert step.step_many([sequence[begin:end]], [cache]) is not None
        return cache

    with torch.inference_mode():
        alone = [step.step_many([[5]], [read(it)]) for it in ids]
        together = step.step_many([[5]] * 3, [read(it) for it in ids])
    assert together is not None
    for got, expected in zip(together, alone, strict=True):
        assert expected is not None
        assert torch.equal(got, expected[0])


@native
def test_a_turn_goes_on_from_what_was_read() -> None:
    with gptq.load(DATA / ONE, device="cpu", kv_cache="int8", plugins=plugins()) as loaded:
        options = gptq.GenerateOptions(max_new_tokens=6, temperature=0)
        first = loaded.generate("Once upon a time there was a river", options)
        again = loaded.generate("Once upon a time there was a river", options)
        assert again.text == first.text
        kept = loaded._cache._kept[-1][1]
        assert all(type(layer) is Int8Layer for layer in kept.layers)


def test_other_kinds_are_refused() -> None:
    with pytest.raises(gptq.OptionInvalid, match="unknown kv_cache 'int3'"):
        gptq.load(DATA / ONE, kv_cache="int3", plugins=plugins())  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [DeepseekV3Config(), Qwen3NextConfig()])
def test_a_model_that_keeps_more_is_refused(config: Any) -> None:
    with pytest.raises(gptq.OptionInvalid, match=f"this {config.model_type} model keeps more"):
        check_int8(config)
