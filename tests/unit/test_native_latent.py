"""Latent attention in native steps: its cache, what is changed of it, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_native_step import build, by_steps, install

from gptq_loader_kernels.cpu.fitting import why_not
from gptq_loader_kernels.cpu.library import find_library
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.generation.cache_layers import LatentLayer
from gptq_loader_plugin.generation.kv_cache import PrefixCache, make_cache, make_int8_cache

if TYPE_CHECKING:
    from collections.abc import Callable

native = pytest.mark.skipif(find_library() is None, reason="the native library was not built")
IDS = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(1))
SIZES = (1, 1, 2, 8, 5, 1)


def test_a_cache_of_latents_grows_and_is_cut_short() -> None:
    layer = LatentLayer()
    keys, values = torch.randn(2, 1, 700, 32), torch.randn(2, 1, 700, 16)
    for at in range(0, 700, 90):
        found = layer.update(keys[:, :, at : at + 90], values[:, :, at : at + 90])
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
    layer.crop(-100)
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]  # as transformers picks sequences
    assert torch.equal(layer.keys, keys[:1, :, :600])
    assert torch.equal(layer.values, values[:1, :, :600])
    layer.update(keys[:1, :, :1], values[:1, :, :1])
    assert layer.get_seq_length() == 601
    assert torch.equal(layer.values[:, :, :600], values[:1, :, :600])
    layer.reset()
    assert (layer.get_seq_length(), layer.keys, layer.values) == (0, None, None)


def scale_in_place(projection: Any) -> None:
    with torch.no_grad():
        projection.weight.mul_(1.5)


def turn_words(projection: Any) -> None:
    projection.words.copy_(torch.flip(projection.words, (0,)))


def replace_words(projection: Any) -> None:
    projection.words = torch.flip(projection.words, (0,))


@native
@pytest.mark.parametrize(
    ("bits", "change"), [(None, scale_in_place), (4, turn_words), (3, replace_words)]
)
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3-halves"])
def test_a_changed_projection_of_latents_is_seen(
    family: str, bits: int | None, change: Callable[[Any], None]
) -> None:
    model = build(family, bits=bits)
    step = install(model)
    before = by_steps(model, IDS, 12, SIZES)
    change(model.model.layers[1].self_attn.kv_b_proj)
    with torch.inference_mode():
        expected = model(input_ids=IDS).logits[:, 12:]
    taken = step.steps
    got = by_steps(model, IDS, 12, SIZES)
    assert step.steps == taken + len(SIZES)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    assert not torch.allclose(before, expected, rtol=2e-3, atol=2e-3)


@native
def test_other_settings_of_latents_are_seen() -> None:
    model = build("deepseek_v3")
    step = install(model)
    attention = [it.self_attn for it in model.model.layers]

    def part() -> None:
        model.config.rope_interleave = False

    def scale() -> None:
        for it in attention:
            it.scaling *= 3

    def change_epsilon() -> None:
        for it in attention:
            it.q_a_layernorm.variance_epsilon = it.kv_a_layernorm.variance_epsilon = 0.5

    for change in (part, scale, change_epsilon):
        change()
        with torch.inference_mode():
            expected = model(input_ids=IDS).logits[:, 12:]
        taken = step.steps
        got = by_steps(model, IDS, 12, SIZES)
        assert step.steps == taken + len(SIZES)
        torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)


@native
@pytest.mark.parametrize("family", ["deepseek_v2", "glm4_moe_lite"])
def test_transformers_generate_takes_steps_of_its_own_cache(family: str) -> None:
    model = build(family)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = model.generate(IDS, **options)
    searched = model.generate(IDS, **options, num_beams=3)
    step = install(model)
    taken = step.steps
    assert torch.equal(model.generate(IDS, **options), expected)
    assert step.steps == taken + 11
    assert torch.equal(model.generate(IDS, **options, num_beams=3), searched)


@native
def test_prompts_of_latents_are_transformers_and_kept() -> None:
    model = build("deepseek_v3", dtype=torch.bfloat16)
    step = install(model)
    assert not step.takes_prompts()
    kept, ids = PrefixCache(), IDS[0].tolist()
    cache, held = kept.reuse(model, ids)
    assert held == 0
    with torch.inference_mode():
        model.model(input_ids=IDS, use_cache=True, cache=cache)
        states = step.step_many([[5, 6]], [cache])
    assert step.prompts == 0
    assert all(type(it) is LatentLayer and it.length == 32 for it in cache.layers)
    kept.store([*ids, 5, 6], cache)
    again, held = kept.reuse(model, [*ids, 5, 6, 7])
    assert again is cache
    assert held == 32
    again.crop(-2)
    with torch.inference_mode():
        same = step.step_many([[5, 6]], [again])
    assert states is not None
    assert same is not None
    assert torch.equal(states, same)


def test_latents_are_not_kept_in_8_bits() -> None:
    with pytest.raises(OptionInvalid, match="cannot be in 8 bits"):
        make_int8_cache(build("deepseek_v3", bits=None))


def set_bias(model: Any) -> None:
    projection = model.model.layers[0].self_attn.kv_b_proj
    projection.bias = torch.nn.Parameter(torch.zeros(projection.out_features))


def set_method(model: Any) -> None:
    model.model.layers[1].mlp.gate.topk_method = "noaux_tc"


def set_rank(model: Any) -> None:
    model.config.kv_lora_rank = 40


def set_rank_of_others(model: Any) -> None:
    model.config.kv_lora_rank = 96


def set_epsilon(model: Any) -> None:
    model.model.layers[1].self_attn.kv_a_layernorm.variance_epsilon = 0.5


@native
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_bias, "kv_b_proj has a bias, of which the step has nothing"),
        (set_method, "mixture 0 chooses experts by noaux_tc"),
        (set_rank, "its latents are 40 and 32 wide; the step takes multiples of 16"),
        (set_rank_of_others, "self_attn.kv_a_proj_with_mqa is 96 x 128, and not 128 x 128"),
        (set_epsilon, "its latents' epsilon is 1e-06 and 0.5; the step takes one"),
    ],
)
def test_other_latents_are_refused(change: Callable[[Any], None], words: str) -> None:
    model = build("deepseek_v2", bits=None)
    assert why_not(model.model) is None
    change(model)
    reason = why_not(model.model)
    assert reason is not None
    assert words in reason


@native
def test_a_cache_of_other_latents_is_not_stepped() -> None:
    model, other = build("deepseek_v2"), build("glm4_moe_lite")
    step = install(model)
    cache = make_cache(other)
    with torch.inference_mode():
        other.model(input_ids=IDS, use_cache=True, cache=cache)
        assert step.step_many([[5]], [cache]) is None
        assert step.step_many([[5]], [make_cache(model)]) is not None
