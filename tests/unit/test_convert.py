"""Checkpoints of every kind in every format: read back by the formats' own packages, to the bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import altered
import pytest
import torch
from gguf import GGUFReader, Keys
from gguf.quants import dequantize
from safetensors.torch import load_file

from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.convert.gguf_blocks import block_type
from gptq_loader_plugin.convert.gguf_vocabulary import pretokenizer_of, read_vocabulary
from gptq_loader_plugin.convert.options import ConvertOptions
from gptq_loader_plugin.convert.run import convert_checkpoint
from gptq_loader_plugin.errors import OptionInvalid, UnsupportedFormat
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.system.units import parse_size

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

DATA = altered.DATA
NAMES = sorted(it.name for it in DATA.iterdir() if it.name.startswith("gptq"))
BLOCKS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
          "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
          "mlp.down_proj": "ffn_down"}  # fmt: skip
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # where AutoAWQ's readers find eight outputs in a word


def convert(source: Path, out: Path, to: Any, **options: Any) -> Any:
    return convert_checkpoint(source, out, options=ConvertOptions(to, **options), plugins=Plugins())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a GPTQ checkpoint, in float32."""
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.packed(name).dequantize() for name in checkpoint.layers}


def turned_back(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Queries or keys as transformers has them: llama.cpp's pairs become halves again."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("name", NAMES)
def test_gguf_read_by_its_own_package(name: str, tmp_path: Path) -> None:
    done = convert(DATA / name, tmp_path / "out", "gguf")
    config = json.loads((DATA / name / "config.json").read_text())
    stored = {it.name: it for it in GGUFReader(done.path).tensors}
    right = weights(DATA / name)
    assert {layer.name for layer in done.layers} == right.keys()
    specs = open_checkpoint(DATA / name).layers
    for layer in done.layers:
        _, _, number, role = layer.name.split(".", 3)
        tensor = stored[f"blk.{number}.{BLOCKS[role]}.weight"]
        found = dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        if (key := heads.get(BLOCKS[role])) is not None:
            found = turned_back(found, config[key])
        equal = torch.equal(torch.from_numpy(found.copy()), right[layer.name])
        assert equal == layer.exact
        if block_type(specs[layer.name]).keeps_codes:
            assert equal
        else:
            assert 0 < layer.error < 0.02
            assert layer.note


@pytest.mark.parametrize("name", NAMES)
def test_compressed_tensors_read_by_its_own_package(name: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    layers = open_checkpoint(DATA / name).layers.values()
    ordered = any(layer.desc_act and layer.groups > 1 for layer in layers)
    if ordered or not all(layer.even_groups for layer in layers):
        with pytest.raises(
            UnsupportedFormat, match="act-order with groups" if ordered else "short"
        ):
            convert(DATA / name, tmp_path / "out", "compressed-tensors")
        return
    done = convert(DATA / name, tmp_path / "out", "compressed-tensors")
    assert all(layer.exact for layer in done.layers)
    tensors = load_file(done.path / "model.safetensors")
    config = json.loads((done.path / "config.json").read_text())["quantization_config"]
    for layer, right in weights(DATA / name).items():
        shape = torch.Size(tensors[f"{layer}.weight_shape"].tolist())
        bits = 32 * tensors[f"{layer}.weight_packed"].shape[1] // shape[1]
        codes = unpack_from_int32(tensors[f"{layer}.weight_packed"], bits, shape).float()
        scale = tensors[f"{layer}.weight_scale"].float()
        columns = torch.arange(shape[1]) // (shape[1] // scale.shape[1])
        if (zeros := tensors.get(f"{layer}.weight_zero_point")) is not None:
            codes -= unpack_from_int32(zeros, bits, scale.shape, packed_dim=0).float()[:, columns]
        assert torch.equal(codes * scale[:, columns], right)
    kinds = [it["weights"] for it in config["config_groups"].values()]
    assert {it["num_bits"] for it in kinds} <= {4, 8}
    assert config["ignore"] == ["lm_head"]
    # what the package itself takes for a config, as vLLM and transformers do
    QuantizationConfig.model_validate(config)


@pytest.mark.parametrize("name", NAMES)
def test_awq_read_as_autoawq_reads(name: str, tmp_path: Path) -> None:
    layers = open_checkpoint(DATA / name).layers.values()
    holds = all(
        layer.bits <= 4 and layer.even_groups and (layer.groups == 1 or not layer.desc_act)
        for layer in layers
    )
    if not holds:
        with pytest.raises(UnsupportedFormat, match="AWQ cannot hold"):
            convert(DATA / name, tmp_path / "out", "awq")
        assert not list(tmp_path.iterdir())
        return
    done = convert(DATA / name, tmp_path / "out", "awq")
    tensors = load_file(done.path / "model.safetensors")

    def unpacked(words: torch.Tensor) -> torch.Tensor:
        shifts = 4 * torch.tensor(NIBBLES)
        return ((words[:, :, None] >> shifts) & 15).flatten(1).float()

    for layer, right in weights(DATA / name).items():
        codes, zeros = (unpacked(tensors[f"{layer}.{it}"]) for it in ("qweight", "qzeros"))
        scales = tensors[f"{layer}.scales"].float()
        rows = torch.arange(len(codes)) // (len(codes) // len(scales))
        found = ((codes - zeros[rows]) * scales[rows]).t()
        exact = next(it.exact for it in done.layers if it.name == layer)
        assert torch.equal(found, right) == exact


@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "safetensors"])
@pytest.mark.parametrize("name", NAMES)
def test_gptq_is_the_same_weights(name: str, to: str, tmp_path: Path) -> None:
    if to != "safetensors" and name.startswith("gptq_p"):
        with pytest.raises(UnsupportedFormat, match="5 bits"):
            convert(DATA / name, tmp_path / "out", to)
        return
    done = convert(DATA / name, tmp_path / "out", to, shard_bytes=100_000)
    assert len(list(done.path.glob("model-*-of-*.safetensors"))) > 1
    assert max(it.stat().st_size for it in done.path.glob("*.safetensors")) < 150_000
    before = weights(DATA / name)
    after = weights(done.path)
    assert all(torch.equal(after[layer], right) for layer, right in before.items())
    config = open_checkpoint(done.path)
    assert to in ("safetensors", config.config.checkpoint_format)
    assert not config.warnings
    if name == "gptq-4bit-64g-act-sym":
        assert altered.off_by(done.path, name) < 1e-4


def test_dense_is_what_transformers_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    name = "gptq-3bit-128g-act-sym"
    done = convert(DATA / name, tmp_path / "out", "dense", dtype="float32")
    assert all(layer.exact for layer in done.layers)
    model = AutoModelForCausalLM.from_pretrained(done.path).eval()
    ids, right = altered.expected(name)
    with torch.inference_mode():
        assert altered.error(model(ids).logits, right) < 1e-4
    half = convert(DATA / name, tmp_path / "half", "dense", dtype="float16")
    assert all(0 < layer.error < 2**-11 for layer in half.layers)


def test_scales_that_float16_lacks_are_refused_or_reported(tmp_path: Path) -> None:
    folder = altered.copy("gptq-4bit-128g-noact-sym", tmp_path / "source")
    layer = "model.layers.0.self_attn.q_proj"

    def bfloat16(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{layer}.scales"] = tensors[f"{layer}.scales"].bfloat16() * 2**-18

    altered.edit_tensors(folder, bfloat16)
    done = convert(folder, tmp_path / "a.gguf", "gguf")
    off = [it for it in done.layers if not it.exact]
    assert [it.name for it in off] == [layer]
    assert off[0].note == "scales rounded to float16"
    altered.edit_tensors(
        folder, lambda it: {**it, f"{layer}.scales": it[f"{layer}.scales"] * 2.0**60}
    )
    with pytest.raises(UnsupportedFormat, match="beyond float16"):
        convert(folder, tmp_path / "b.gguf", "gguf")
    assert sorted(it.name for it in tmp_path.iterdir()) == ["a.gguf", "source"]


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(OptionInvalid, match="is there already"):
        convert(DATA / NAMES[0], tmp_path / "out", "dense")
    assert [it.name for it in (tmp_path / "out").iterdir()] == ["mine"]


def test_a_run_that_is_interrupted_or_killed_leaves_no_half(tmp_path: Path) -> None:
    source = altered.copy("gptq-4bit-128g-noact-sym", tmp_path / "source")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from gptq_loader_plugin.convert.options import ConvertOptions\n"
        "from gptq_loader_plugin.convert.run import convert_checkpoint\n"
        "from gptq_loader_plugin.plugins import Plugins\n"
        "def progress(it):\n"
        "    if it.done == 5: os.kill(os.getpid(), int(sys.argv[3]))\n"
        "convert_checkpoint(sys.argv[1], Path(sys.argv[2]), options=ConvertOptions('gptq'),\n"
        "                   plugins=Plugins(), progress=progress)\n"
    )
    for number in (signal.SIGINT, signal.SIGKILL):
        process = subprocess.run(
            [sys.executable, "-c", script, source, tmp_path / "out", str(int(number))],
            check=False, capture_output=True, timeout=300,
        )  # fmt: skip
        assert process.returncode != 0
        assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", "gptq")  # removes what the killed one left
    assert sorted(it.name for it in tmp_path.iterdir()) == ["out", "source"]


def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "gptq_loader_plugin", "convert", *arguments],
            check=False, capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    source = str(DATA / "gptq-4bit-32g-act-sym")
    done = run(source, str(tmp_path / "a.gguf"), "--to", "gguf", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["exact"] is False
    assert {layer["kind"] for layer in data["layers"]} == {"Q8_0"}
    wrong = run(source, str(tmp_path / "b"), "--to", "exl2")
    assert wrong.returncode == 1
    assert "choose one of gguf, dense" in wrong.stderr


def test_the_file_says_what_llama_cpp_needs(tmp_path: Path) -> None:
    name = "gptq-4bit-128g-noact-sym"
    done = convert(DATA / name, tmp_path / "a.gguf", "gguf")
    fields = GGUFReader(done.path).fields
    config = json.loads((DATA / name / "config.json").read_text())
    assert fields[Keys.General.ARCHITECTURE].contents() == "llama"
    assert fields["llama.block_count"].contents() == config["num_hidden_layers"]
    assert fields["llama.attention.head_count_kv"].contents() == config["num_key_value_heads"]
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == config["vocab_size"]
    template = (DATA / name / "chat_template.jinja").read_text()
    assert fields["tokenizer.chat_template"].contents() == template


SPLITS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [{"type": "ByteLevel"}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")}},
        {"type": "ByteLevel", "use_regex": False},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SPLITS)
def test_how_text_is_split_is_known_by_its_pattern(name: str) -> None:
    split = {"type": "Sequence", "pretokenizers": SPLITS[name]}
    assert pretokenizer_of({"pre_tokenizer": split}) == name
    other = {"type": "Sequence", "pretokenizers": [*SPLITS[name], {"type": "Punctuation"}]}
    assert pretokenizer_of({"pre_tokenizer": other}) is None


def test_an_unknown_way_to_split_is_refused(tmp_path: Path) -> None:
    folder = altered.copy("gptq-4bit-128g-noact-sym", tmp_path / "source")
    altered.edit_json(
        folder / "tokenizer.json",
        lambda it: it.update(pre_tokenizer={"type": "Whitespace"}),
    )
    with pytest.raises(UnsupportedFormat, match="splits text"):
        read_vocabulary(folder, rows=100, pretokenizer=None)
    assert read_vocabulary(folder, rows=100, pretokenizer="gpt-2").pretokenizer == "gpt-2"
    shutil.rmtree(folder)


def test_sizes() -> None:
    assert [parse_size(it) for it in ("5GB", "1.5 kb", "700")] == [5_000_000_000, 1500, 700]
    assert parse_size("2 GiB") == parse_size("2gib") == 2 << 30
    for wrong in ("", "five", "-3GB", "3 bpw"):
        with pytest.raises(OptionInvalid):
            parse_size(wrong)
    with pytest.raises(OptionInvalid):
        ConvertOptions("dense", shard_bytes=0)
