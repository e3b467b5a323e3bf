"""GPTQ-for-LLaMa's files of March 2023, with float zeros, are read exactly; others are named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, copy, error, expected, plugins, read_tensors, without_config
from safetensors.torch import save_file

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.early import EarlyCheckpoint
from gptq_loader_plugin.checkpoint.reader import GPTQReader, open_checkpoint

if TYPE_CHECKING:
    from pathlib import Path

WITHOUT_GROUPS = ["gptq-3bit-noneg-act-sym", "gptq-4bit-noneg-act-sym"]


def write_early(name: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint without groups as GPTQ-for-LLaMa's first version packed it."""
    copy(name, folder)
    without_config(folder)
    source = open_checkpoint(DATA / name)
    packed = {part for layer in source.layers for part in source.layer_tensors(layer)}
    tensors = {key: it for key, it in read_tensors(folder).items() if key not in packed}
    for layer in source.layers:
        parts = source.packed(layer)
        scales = parts.scales.to(dtype)
        tensors[f"{layer}.qweight"] = parts.qweight.clone()
        tensors[f"{layer}.scales"] = scales.t().contiguous()
        tensors[f"{layer}.zeros"] = (scales * parts.zeros).t().contiguous()
        tensors[f"{layer}.bias"] = torch.zeros(parts.qweight.shape[1])
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "llama-7b-4bit.pt")
    source.close()
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", WITHOUT_GROUPS)
def test_float_zeros_are_read_exactly(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write_early(name, tmp_path / "model", dtype=dtype)
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, EarlyCheckpoint)
    assert checkpoint.config.bits == int(name[5])
    assert (checkpoint.config.group_size, checkpoint.config.sym) == (-1, True)
    ids, right = expected(name)
    with (
        gptq.load(folder, device="cpu", backend="reference", plugins=plugins()) as model,
        torch.inference_mode(),
    ):
        found: Any = model.model(ids).logits
        assert error(found, right) < 1e-6
    report = gptq.inspect(folder).to_json()
    assert (report["bits"], report["group_size"]) == (int(name[5]), -1)


def test_zeros_that_are_no_whole_numbers_are_refused(tmp_path: Path) -> None:
    folder = write_early(WITHOUT_GROUPS[1], tmp_path / "model")
    file = folder / "llama-7b-4bit.pt"
    tensors = torch.load(file, weights_only=True)
    name = next(it for it in tensors if it.endswith(".zeros"))
    tensors[name][0] += tensors[name.replace(".zeros", ".scales")][0] * 0.4
    torch.save(tensors, file)
    with pytest.raises(gptq.UnsupportedFormat, match="not whole numbers of 4-bit scales"):
        open_checkpoint(folder)


OTHERS = {
    "MLX": {"q.weight": torch.zeros(4, 4, dtype=torch.uint32), "q.scales": torch.zeros(4, 1),
            "q.biases": torch.zeros(4, 1)},
    "HQQ": {"q.W_q": torch.zeros(4, 4, dtype=torch.uint8)},
    "compressed-tensors": {"q.weight_packed": torch.zeros(4, 4, dtype=torch.int32)},
    "bitsandbytes": {"q.weight.absmax": torch.zeros(4)},
    "EXL3": {"q.trellis": torch.zeros(4)},
}  # fmt: skip


@pytest.mark.parametrize("method", OTHERS)
def test_other_formats_are_named(method: str, tmp_path: Path) -> None:
    folder = copy("gptq-4bit-noneg-act-sym", tmp_path / "model")
    without_config(folder)
    save_file(OTHERS[method], folder / "model.safetensors")
    with pytest.raises(gptq.UnsupportedFormat, match=f"a checkpoint of {method}, not of GPTQ"):
        GPTQReader().open(folder)


def test_hqqs_pickle_is_named(tmp_path: Path) -> None:
    folder = copy("gptq-4bit-noneg-act-sym", tmp_path / "model")
    without_config(folder)
    (folder / "model.safetensors").unlink()
    layer = {"W_q": torch.zeros(4, 4, dtype=torch.uint8), "meta": {"nbits": 4}}
    torch.save({"model.layers.0.self_attn.q_proj": layer}, folder / "qmodel.pt")
    with pytest.raises(gptq.UnsupportedFormat, match="a checkpoint of HQQ, not of GPTQ"):
        GPTQReader().open(folder)
