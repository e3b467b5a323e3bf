"""The noise floor: one definition, for every dtype and kernel, and for whoever asks."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import altered
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import gptq_loader_plugin as gptq
from gptq_loader_plugin.generation.kl_divergence import kl_divergence
from gptq_loader_plugin.generation.noise_floor import bfloat16_noise, find_blocks
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.measure.compare import compare_checkpoints
from gptq_loader_plugin.measure.divergence import compute_logits
from gptq_loader_plugin.measure.perplexity import cut_windows, sample_text
from gptq_loader_plugin.quantize.quality import HeldOutText
from gptq_loader_plugin.quantize.source import load_source
from gptq_loader_plugin.verify.run import verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE = altered.DATA / "base"
PACKED = altered.DATA / "gptq-4bit-32g-act-sym"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def some_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def outputs(model: PreTrainedModel, name: str, *, noisy: bool) -> torch.Tensor:
    """Return what one module hands on, as the next one gets it."""
    seen: list[torch.Tensor] = []
    ids = torch.arange(48)[None]

    def note(_module: object, _inputs: object, output: torch.Tensor) -> None:
        seen.append(output)

    if noisy:
        with bfloat16_noise(model), torch.inference_mode():
            handle = model.get_submodule(name).register_forward_hook(note)
            model(ids)
    else:
        handle = model.get_submodule(name).register_forward_hook(note)
        with torch.inference_mode():
            model(ids)
    handle.remove()
    return seen[0].float()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_as_large_as_bfloat16s(dtype: torch.dtype) -> None:
    """Its mean square is that of rounding to bfloat16, in each dtype, and it leans to no side."""
    model = some_model(dtype)
    right = outputs(model, "model.embed_tokens", noisy=False)
    error = outputs(model, "model.embed_tokens", noisy=True) - right
    rounding = right.bfloat16().float() - right
    if dtype is torch.bfloat16:
        assert not rounding.any(), "which is why it cannot be rounding itself"
        rounding = (finer := some_model()).get_input_embeddings().weight.detach()[:48]
        rounding = rounding.bfloat16().float() - rounding
        del finer
    assert float(error.square().mean().sqrt()) == pytest.approx(
        float(rounding.square().mean().sqrt()), rel=0.15
    )
    assert abs(float(error.mean())) < float(error.abs().mean()) / 5
    largest = torch.ldexp(torch.ones_like(right), torch.frexp(right).exponent - 8)
    assert bool((error.abs() <= largest).all())


def test_zeros_stay_zeros() -> None:
    model = some_model()
    model.get_input_embeddings().weight.data[:8].zero_()
    noisy = outputs(model, "model.embed_tokens", noisy=True)
    assert not noisy[0, :8].any()
    assert noisy[0, 8:].all()


def test_it_has_a_seed_and_nothing_stays() -> None:
    model = some_model()
    assert [name for name, _ in find_blocks(model)] == [f"model.layers.{i}" for i in range(3)]
    window = torch.arange(48)
    before = compute_logits(model, window)
    noisy = compute_logits(model, window, is_noisy=True)
    assert not torch.equal(before, noisy)
    assert torch.equal(noisy, compute_logits(model, window, is_noisy=True)), "it has a seed"
    assert torch.equal(before, compute_logits(model, window))


def test_each_block_adds_an_error_of_its_own() -> None:
    model = some_model()
    for _, block in find_blocks(model):  # which then hands on what it reads
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    names = ["model.embed_tokens", *(name for name, _ in find_blocks(model))]
    states = [outputs(model, name, noisy=True) for name in names]
    right = outputs(model, names[-1], noisy=False)
    sizes = [float((it - right).norm()) for it in states]
    assert sizes == sorted(sizes)
    assert sizes[3] == pytest.approx(2 * sizes[0], rel=0.1), "four errors that are independent"


def test_another_thread_computes_undisturbed() -> None:
    model, window = some_model(), torch.arange(48)
    right = compute_logits(model, window)
    others: list[torch.Tensor] = []
    with bfloat16_noise(model):
        thread = threading.Thread(target=lambda: others.append(compute_logits(model, window)))
        thread.start()
        thread.join(60)
        own = compute_logits(model, window)
    assert torch.equal(others[0], right)
    assert not torch.equal(own, right)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_packed_layers_have_the_floor_of_plain_ones(backend: str) -> None:
    """Whether Python or a native call runs the blocks: where someone watches, it steps aside."""
    options = LoadOptions(device="cpu", backend=backend, dtype="float32")
    with gptq.load(PACKED, options=options, plugins=altered.plugins()) as model:
        window = cut_windows(model, sample_text(), windows=1, window_tokens=128)[0]
        floor = floor_of(model.model, window)
    plain = floor_of(AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), window)
    assert 0.2 * plain < floor < 5 * plain


def test_all_three_measure_the_same() -> None:
    """Of one model on one text: `compare`, `verify --reference`, and `quantize`."""
    compared = compare_checkpoints(
        [str(PACKED)], sample_text(), text_name="Sample", options=LoadOptions(device="cpu"),
        plugins=altered.plugins(), unquantized=BASE, windows=4, window_tokens=256, speed=False,
    ).noise.mean  # fmt: skip
    report = verify(
        str(PACKED), options=LoadOptions(device="cpu"), plugins=altered.plugins(), against=BASE
    )
    model, tokenizer = load_source(BASE)
    written = HeldOutText(model, tokenizer, sample_text(), lambda _: None).floor.kl
    assert report.facts["reference"]["kl_noise_floor"] == pytest.approx(compared, rel=0.25)
    assert written == pytest.approx(compared, rel=0.25)


def floor_of(model: PreTrainedModel, window: torch.Tensor) -> float:
    right = compute_logits(model, window).float().log_softmax(-1)
    noisy = compute_logits(model, window, is_noisy=True).float().log_softmax(-1)
    return float(kl_divergence(right, noisy).mean())
