"""gpt-oss decodes natively from its checkpoints, whoever wrote them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from published import dequantised, publish
from round_trip import IDS, logits, relative_rms
from test_every_family import as_gptqmodel, edit
from test_native_step import build, by_steps, install

from gptq_loader_kernels.cpu.decoder import NativeDecoder
from gptq_loader_kernels.cpu.fitting import why_not
from gptq_loader_kernels.cpu.library import Isa, find_library, load_library
from gptq_loader_plugin.loading import load

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(find_library() is None, reason="the native library was not built")

SIZES = (1, 1, 3, 5)


def read(folder: Path, dtype: str) -> tuple[Any, NativeDecoder]:
    """Load a checkpoint, and return the model and what decodes it."""
    loaded = load(folder, backend="cpu", device="cpu", dtype=dtype)
    assert "decodes in native steps" in str(loaded.explain())
    decoder = loaded.model.base_model.forward.__self__
    assert isinstance(decoder, NativeDecoder)
    return loaded.model, decoder


def begin(ids: list[int]) -> int:
    """How many tokens are a prompt, before those in steps."""
    return len(ids) - sum(SIZES)


@pytest.mark.parametrize("writer", ["gate and up apart", "gate_up by GPTQModel"])
def test_a_checkpoint_steps_natively(writer: str, tmp_path: Path) -> None:
    published = publish("gpt_oss", tmp_path)
    expected = logits(dequantised(published.packed, published, tmp_path / "right"), IDS)
    if writer == "gate_up by GPTQModel":
        edit(published, as_gptqmodel(published))
    model, step = read(published.packed, "float32")
    taken = step.steps
    found = by_steps(model, torch.tensor([IDS]), begin(IDS), SIZES)
    assert step.steps == taken + len(SIZES)
    assert relative_rms(found[0], expected[begin(IDS) :]) < 1e-4


@pytest.mark.skipif(
    find_library() is None or load_library().gptq_isa() < Isa.AVX512_BF16,
    reason="no bfloat16 products here",
)
def test_a_checkpoint_in_bfloat16_steps_and_reads_prompts(tmp_path: Path) -> None:
    published = publish("gpt_oss", tmp_path)
    exact = logits(dequantised(published.packed, published, tmp_path / "right"), IDS)
    model, step = read(published.packed, "bfloat16")
    taken, prompts, ids = step.steps, step.prompts, torch.tensor([IDS])
    found = by_steps(model, ids, 1, (begin(IDS) - 1, *SIZES))
    assert (step.steps, step.prompts) == (taken + 1 + len(SIZES), prompts + 1)
    model.model.forward = step.otherwise
    plain = by_steps(model, ids, 1, (begin(IDS) - 1, *SIZES))
    assert relative_rms(found[0], exact[1:]) < 1.2 * relative_rms(plain[0], exact[1:])


def change(model: Any, what: str) -> None:
    """Change one part of every layer."""
    for layer in model.model.layers:
        if what == "sinks":
            layer.self_attn.sinks.data += 2
        elif what == "bias of the router":
            layer.mlp.router.bias.data = layer.mlp.router.bias.data.flip(0) * 3
        else:
            setattr(layer.mlp.experts.fused, what, 0.7)


@pytest.mark.parametrize("what", ["sinks", "bias of the router", "alpha", "limit"])
def test_every_part_counts_and_is_seen_when_it_changes(what: str) -> None:
    model = build("gpt_oss")
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    step = install(model)
    before = by_steps(model, ids, 14, (1, 8, 1))
    change(model, what)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits[:, 14:]
    assert not torch.allclose(before, expected, rtol=2e-3, atol=2e-3)
    taken = step.steps
    found = by_steps(model, ids, 14, (1, 8, 1))
    assert step.steps == taken + 3
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


def test_what_does_not_fit_is_refused_in_words() -> None:
    decoder = build("gpt_oss", bits=None).model
    assert why_not(decoder) is None
    decoder.layers[1].mlp.experts.fused.limit = 3.0
    assert "its swiglu is" in str(why_not(decoder))
    decoder = build("gpt_oss", bits=None).model
    decoder.layers[0].self_attn.sinks = torch.nn.Parameter(torch.zeros(3))
    assert why_not(decoder) == "sinks is 3, and not 4"
    decoder = build("gpt_oss", bits=None).model
    decoder.layers[0].self_attn.sinks.data = torch.zeros(4, dtype=torch.bfloat16)
    assert why_not(decoder) == "sinks is in torch.bfloat16, and its last norm in torch.float32"
    decoder = build("gpt_oss", bits=None).model
    decoder.layers[0].mlp.router.bias = torch.nn.Parameter(torch.zeros(4))
    assert why_not(decoder) == "mlp.router.bias is 4, and not 5"
