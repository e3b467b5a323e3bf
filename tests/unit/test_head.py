"""An 8-bit head made at load."""

from __future__ import annotations

import pytest
import torch
from altered import DATA, ONE, plugins

import gptq_loader_plugin as gptq
from gptq_loader_plugin.model.int8_head import quantize_rows


@pytest.mark.parametrize("scale", [0.05, 1e-4])
@pytest.mark.parametrize("rows", [64, 100, 576])
def test_rows_are_rounded_to_the_nearest_step(rows: int, scale: float) -> None:
    weight = torch.randn(70, rows, generator=torch.Generator().manual_seed(0)) * scale
    weight[3] = 0
    packed = quantize_rows(weight)
    step = packed.scales.float()[packed.g_idx.long()].T
    assert bool(((packed.dequantize() - weight).abs() <= 0.51 * step).all())
    assert int(packed.codes().min()) >= 1


@pytest.mark.parametrize("backend", [None, "reference"])
def test_a_head_is_made_narrow_by_name_and_said(backend: str | None) -> None:
    where = DATA / ONE
    with gptq.load(where, device="cpu", backend=backend, plugins=plugins()) as stored:
        shared = stored.model.get_input_embeddings().weight.clone()
        ids = stored.model.dummy_inputs["input_ids"][:1]
        with torch.inference_mode():
            expected = stored.model(input_ids=ids).logits.float()
        assert "the head is 8-bit" not in stored.explain()
    with gptq.load(where, device="cpu", backend=backend, head="int8", plugins=plugins()) as model:
        assert "the head is 8-bit" in model.explain()
        assert torch.equal(model.model.get_input_embeddings().weight, shared)
        with torch.inference_mode():
            logits = model.model(input_ids=ids).logits.float()
        error = (logits - expected).norm() / expected.norm()
        assert 0 < error < 2e-2
        reply = model.generate("The", gptq.GenerateOptions(max_new_tokens=4, temperature=0))
        assert reply.tokens == 4


def test_an_unknown_head_is_said() -> None:
    with pytest.raises(gptq.OptionInvalid, match="unknown head 'int4'"):
        gptq.load(DATA / ONE, device="cpu", head="int4", plugins=plugins())  # type: ignore[arg-type]
