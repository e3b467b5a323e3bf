"""What bench/ writes for other programs is what they would write, with values near one."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from types import ModuleType

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Import scripts of bench/ as they import one another."""
    import importlib

    monkeypatch.syspath_prepend(BENCH)
    found = {it: importlib.import_module(it) for it in ("shapes", "gguf_shapes", "dense_shapes")}
    for name in found:
        monkeypatch.delitem(sys.modules, name)
    return found


@pytest.mark.parametrize(
    ("mix", "hidden", "tied", "types"),
    [
        ("Q4_0", 512, False, {"Q4_0": 15, "Q6_K": 1, "F32": 5}),
        ("Q4_0", 192, True, {"Q4_0": 14, "Q8_0": 1, "F32": 5}),
        # values and the last projection of layers that llama.cpp gives more bits
        ("Q4_K_M", 512, False, {"Q4_K": 13, "Q6_K": 3, "F32": 5}),
        ("Q4_K_M", 192, True, {"Q4_K": 1, "Q5_0": 11, "Q6_K": 1, "Q8_0": 2, "F32": 5}),
    ],
)
def test_a_gguf_file_has_the_types_of_its_mix(
    tmp_path: Path,
    modules: dict[str, ModuleType],
    mix: str,
    hidden: int,
    tied: bool,
    types: dict[str, int],
) -> None:
    shape = modules["shapes"].Shape(hidden, 512, 2, 2, 1, 300, 128, tied=tied)
    file = modules["gguf_shapes"].write_gguf(tmp_path / "it.gguf", shape, mix=mix)
    tensors = {it.name: it for it in gguf.GGUFReader(file).tensors}
    assert Counter(it.tensor_type.name for it in tensors.values()) == types
    for name, tensor in tensors.items():
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        columns = values.shape[-1]
        if tensor.tensor_type.name == "F32":
            assert (values == 1).all()
            continue
        gain = 0.5 if "attn_output" in name or "ffn_down" in name else 1.0
        wanted = 1.0 if name == "token_embd.weight" else gain / columns**0.5
        assert values.std() == pytest.approx(wanted, rel=0.05), name
        assert abs(values.mean()) < 0.15 * wanted, name  # codes -8 to 7 have a middle of -0.5
    everything = sum(int(it.n_bytes) for it in tensors.values())
    table = 0 if tied else int(tensors["token_embd.weight"].n_bytes)
    assert modules["gguf_shapes"].token_bytes(file) == everything - table


@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_checkpoint_loads(
    tmp_path: Path, modules: dict[str, ModuleType], tied: bool
) -> None:
    shape = modules["shapes"].Shape(128, 256, 2, 2, 1, 300, 128, tied=tied)
    folder = modules["dense_shapes"].write_dense(tmp_path / "dense", shape)
    assert {it.name for it in folder.iterdir()} == {
        "config.json",
        "model-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    loaded = model.state_dict()
    for name, tensor in load_file(folder / "model-00001.safetensors").items():
        assert torch.equal(loaded[name], tensor), name
    logits = model(torch.arange(20, 30)[None]).logits
    assert logits.isfinite().all()
