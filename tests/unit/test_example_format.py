"""`examples/my_format`: a format whose tensors have other names is read, exactly, as a plugin."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from altered import DATA, PLUGINS, read_tensors
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.reader import open_checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).parents[2]
SOURCES = {
    "gptq-2bit-64g-noact-sym": False,
    "gptq-3bit-32g-noact-asym": False,
    "gptq-4bit-128g-noact-sym": False,
    "gptq-4bit-32g-act-asym": True,
    "gptq-8bit-128g-act-sym": True,
}


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "examples" / "my_format"))
    try:
        import my_gptq_format

        yield my_gptq_format
    finally:
        sys.path.pop(0)


def write(name: str, folder: Path) -> QuantizationScheme:
    """Write a tests' checkpoint as llm-compressor would: compressed-tensors packs the codes."""
    folder.mkdir()
    for file in (DATA / name).glob("*.json"):
        if file.name != "quantize_config.json":
            shutil.copyfile(file, folder / file.name)
    source = open_checkpoint(DATA / name)
    bits, group_size = source.config.bits, source.config.group_size
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=source.config.sym,
        strategy="group",
        group_size=group_size,
    )
    packed_names = {tensor for layer in source.layers for tensor in source.layer_tensors(layer)}
    tensors = {key: it for key, it in read_tensors(DATA / name).items() if key not in packed_names}
    for layer in source.layers.values():
        packed, offset = source.packed(layer.name), 1 << (bits - 1)
        codes = (packed.codes().int() - offset).to(torch.int8).t().contiguous()
        tensors[f"{layer.name}.weight_packed"] = pack_to_int32(codes, bits)
        tensors[f"{layer.name}.weight_scale"] = packed.scales.t().contiguous()
        tensors[f"{layer.name}.weight_shape"] = torch.tensor(codes.shape)
        if not source.config.sym:
            zeros = (packed.zeros.int() - offset).to(torch.int8).t().contiguous()
            zero_points = pack_to_int32(zeros, bits, packed_dim=0)
            tensors[f"{layer.name}.weight_zero_point"] = zero_points.contiguous()
        if layer.desc_act:
            tensors[f"{layer.name}.weight_g_idx"] = packed.g_idx
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights.model_dump()}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    source.close()
    return QuantizationScheme(targets=["Linear"], weights=weights)


# compressed-tensors itself neither takes a group order any more nor a last group that is short
@pytest.mark.parametrize("name", ["gptq-2bit-64g-noact-sym", "gptq-3bit-32g-noact-asym"])
def test_a_layer_is_what_compressed_tensors_makes_of_it(
    name: str, example: ModuleType, tmp_path: Path
) -> None:
    scheme = write(name, tmp_path / "packed")
    checkpoint = example.PackQuantizedReader().open(tmp_path / "packed")
    stored = read_tensors(tmp_path / "packed")
    assert checkpoint.layers.keys() == open_checkpoint(DATA / name).layers.keys()
    for layer in list(checkpoint.layers)[:7]:
        state = {
            key.removeprefix(f"{layer}."): it
            for key, it in stored.items()
            if key.startswith(f"{layer}.")
        }
        theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"].float()
        ours = checkpoint.packed(layer).dequantize(torch.float32)
        assert torch.allclose(ours, theirs, rtol=2e-3, atol=1e-6)  # theirs rounds to float16


@pytest.mark.parametrize("name", SOURCES)
def test_it_answers_as_the_gptq_checkpoint_does(
    name: str, example: ModuleType, tmp_path: Path
) -> None:
    write(name, tmp_path / "packed")
    plugins = gptq.Plugins(example, installed=True, environ=PLUGINS)
    plan = gptq.explain(tmp_path / "packed", device="cpu", plugins=plugins)
    assert plan.kernels() == gptq.explain(DATA / name, device="cpu", plugins=plugins).kernels()
    assert any(choice.layer.desc_act for choice in plan.choices) == SOURCES[name]
    ids = torch.arange(3, 40)[None]
    logits = []
    for folder in (tmp_path / "packed", DATA / name):
        with gptq.load(folder, device="cpu", backend="reference", plugins=plugins) as model:
            with torch.inference_mode():
                logits.append(model.model(ids).logits)
            assert model.generate("hello", gptq.GenerateOptions(temperature=0)).tokens > 0
    assert torch.equal(*logits)


def test_a_reader_that_answers_something_else_is_named(tmp_path: Path) -> None:
    class Halfway:
        name = "halfway"

        def open(self, path: Path) -> object:
            return type("Half", (), {"path": path, "layers": {}})()

    with pytest.raises(gptq.PluginError, match=r"the reader halfway answered .* has no card"):
        open_checkpoint(tmp_path, (Halfway(),))
