"""Keys and values in 8 bits, where they are asked for."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from altered import DATA, ONE, plugins

import gptq_loader_plugin as gptq
from gptq_loader_plugin.generation.kv_cache import check_int8, make_cache, make_int8_cache

MISSING = find_spec("hqq") is None
FIRST = 200  # tokens read at once: 8 bits begin with them


def steps(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Read FIRST tokens at once and the others one by one, as a reply does."""
    with torch.inference_mode():
        parts = [ids[:, :FIRST], *ids[:, FIRST:].split(1, dim=1)]
        logits = [model(it, past_key_values=cache, use_cache=True).logits for it in parts]
    return torch.cat(logits, dim=1).float()


@pytest.mark.skipif(MISSING, reason="hqq is not installed")
@pytest.mark.filterwarnings("ignore")  # hqq's own
def test_it_is_near_and_takes_what_is_planned() -> None:
    with gptq.load(DATA / ONE, device="cpu", kv_cache="int8", plugins=plugins()) as loaded:
        ids = (torch.arange(FIRST + 10) % 300)[None]
        cache = make_int8_cache(loaded.model)
        found = steps(loaded.model, cache, ids)
        expected = steps(loaded.model, make_cache(loaded.model), ids)
        assert float((found - expected).norm() / expected.norm()) < 0.03
        taken = 0
        for layer in cache.layers:
            for codes, meta in (layer._quantized_keys, layer._quantized_values):
                taken += codes.nbytes + meta["scale"].nbytes + meta["zero"].nbytes
        assert loaded.plan.kv_bytes_per_token == pytest.approx(taken / FIRST, rel=0.03)
        options = gptq.GenerateOptions(max_new_tokens=6, temperature=0)
        first = loaded.generate("Hello", options)
        assert loaded.generate("Hello", options) == first


@pytest.mark.skipif(not MISSING, reason="hqq is installed")
def test_without_its_package_it_is_refused() -> None:
    with pytest.raises(gptq.OptionInvalid, match="hqq, which is not installed") as caught:
        gptq.load(DATA / ONE, device="cpu", kv_cache="int8", plugins=plugins())
    assert caught.value.hint.startswith("pip install hqq")


def test_other_kinds_are_refused() -> None:
    with pytest.raises(gptq.OptionInvalid, match="unknown kv_cache 'int3'"):
        gptq.load(DATA / ONE, kv_cache="int3", plugins=plugins())  # type: ignore[arg-type]


def test_a_model_that_slides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MistralConfig

    monkeypatch.setattr("gptq_loader_plugin.generation.kv_cache.find_spec", lambda name: name)
    with pytest.raises(gptq.OptionInvalid, match="this mistral model's context"):
        check_int8(MistralConfig(sliding_window=32))
