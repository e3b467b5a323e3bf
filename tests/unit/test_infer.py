"""Odd checkpoints: uneven groups, mixed widths, quantised heads; and the config's own words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from altered import (
    NAMES,
    ONE,
    Tensors,
    copy,
    edit_json,
    edit_tensors,
    error,
    plugins,
    read_tensors,
    set_field,
    without_config,
)

import gptq_loader_plugin as gptq
from gptq_loader_kernels.cpu.library import find_library
from gptq_loader_plugin.checkpoint.reader import GPTQReader
from gptq_loader_plugin.kernel.packing import pack_columns, pack_rows

if TYPE_CHECKING:
    from pathlib import Path

LAYERS = [
    f"model.layers.{i}.{name}"
    for i in range(2)
    for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip


def packed_layer(
    name: str,
    rows: int,
    columns: int,
    *,
    bits: int,
    g_idx: np.ndarray,
    seed: int = 0,
) -> tuple[Tensors, torch.Tensor]:
    """(the tensors of a random layer in the format gptq, its weight in float32 [N, K])."""
    random = np.random.default_rng(seed)
    groups = int(g_idx.max()) + 1
    codes = random.integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    zeros = random.integers(1, 2**bits, (groups, columns), dtype=np.uint8)
    scales = (random.random((groups, columns), dtype=np.float32) + 0.5) / 2**bits / 8
    scales = scales.astype(np.float16).astype(np.float32)
    weight = (codes.astype(np.float32) - zeros[g_idx]) * scales[g_idx]
    tensors = {
        f"{name}.qweight": torch.from_numpy(pack_rows(codes, bits, "continuous")),
        f"{name}.qzeros": torch.from_numpy(pack_columns(zeros - 1, bits, "continuous")),
        f"{name}.scales": torch.from_numpy(scales).half(),
        f"{name}.g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    return tensors, torch.from_numpy(weight.T.copy())


def put_layer(folder: Path, name: str, **options: Any) -> torch.Tensor:
    """Put a random layer in the place of `name`; give its weight."""
    old = read_tensors(folder)[f"{name}.g_idx"].shape[0]
    columns = read_tensors(folder)[f"{name}.scales"].shape[1]
    tensors, weight = packed_layer(name, old, columns, **options)
    edit_tensors(folder, lambda it: it | tensors)
    return weight


@pytest.mark.parametrize("backend", ["reference", "dense", "cpu", "cpu-int4"])
def test_uneven_groups(backend: str, tmp_path: Path) -> None:
    """Some writers let act-order fill groups unevenly; every kernel says so or runs it right."""
    folder = copy(ONE, tmp_path)
    g_idx = np.repeat(np.arange(4), [64, 32, 16, 16])[np.random.default_rng(1).permutation(128)]
    name = LAYERS[0]
    weight = put_layer(folder, name, bits=4, g_idx=g_idx)
    checkpoint = GPTQReader().open(folder)
    assert checkpoint.layers[name].group_rows == (16, 64)
    assert not checkpoint.layers[name].even_groups
    torch.testing.assert_close(checkpoint.packed(name).dequantize(), weight)
    if backend == "cpu-int4" or (backend == "cpu" and find_library() is None):
        with pytest.raises(gptq.NoBackend, match=r"groups|compiler"):
            gptq.load(folder, device="cpu", backend=backend, plugins=plugins())
        return
    with gptq.load(folder, device="cpu", backend=backend, plugins=plugins()) as model:
        x = torch.randn(3, 128)
        layer = model.model.get_submodule(name)
        assert error(layer(x), x @ weight.t()) < (1e-5 if backend == "reference" else 1e-2)


@pytest.mark.parametrize("rows", [16, 24, 48, 80])
def test_groups_that_do_not_divide_the_rows(rows: int, tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    without_config(folder)
    weight = put_layer(folder, LAYERS[0], bits=4, g_idx=np.arange(128) // rows)
    checkpoint = GPTQReader().open(folder)
    layer = checkpoint.layers[LAYERS[0]]
    assert layer.group_size == rows
    assert layer.group_rows == (128 % rows or rows, rows)
    assert not layer.desc_act
    torch.testing.assert_close(checkpoint.packed(LAYERS[0]).dequantize(), weight)


def test_widths_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    """GPTQModel's `dynamic` gives modules settings of their own."""
    folder = copy(ONE, tmp_path)
    weights = {}
    for i, (bits, size) in enumerate(((8, 32), (3, 64), (2, 16), (4, 128))):
        g_idx = np.arange(128) // size
        weights[LAYERS[i]] = put_layer(folder, LAYERS[i], bits=bits, g_idx=g_idx, seed=i)
    dynamic = {
        r"+:model\.layers\.0\.self_attn\.q_proj": {"bits": 8},
        r"+:model\.layers\.0\.self_attn\.k_proj": {"bits": 3, "group_size": 64},
        r"model\.layers\.0\.self_attn\.v_proj": {"bits": 2, "group_size": 16},
        r"+:.*\.0\.self_attn\.o_proj": {"group_size": 128},
    }
    set_field(folder, dynamic=dynamic, sym=False)
    checkpoint = GPTQReader().open(folder)
    assert not checkpoint.warnings
    assert (checkpoint.config.bits, checkpoint.config.group_size) == (4, 32)
    found = [(checkpoint.layers[it].bits, checkpoint.layers[it].group_size) for it in LAYERS[:5]]
    assert found == [(8, 32), (3, 64), (2, 16), (4, -1), (4, 32)]
    for name, weight in weights.items():
        torch.testing.assert_close(checkpoint.packed(name).dequantize(), weight)
    with gptq.load(folder, device="cpu", plugins=plugins()) as model:
        assert sum(model.plan.kernels().values()) == 14
        words = model.explain()
    for bits in ("8-bit", "3-bit", "2-bit", "4-bit"):
        assert bits in words
    without_config(folder)  # and without a word of it
    again = GPTQReader().open(folder)
    assert [again.layers[it].bits for it in LAYERS[:5]] == [8, 3, 2, 4, 4]


def test_layers_that_dynamic_leaves_alone_stay_plain(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    name = LAYERS[3]
    weight = GPTQReader().open(folder).packed(name).dequantize()

    def plain(tensors: Tensors) -> Tensors:
        kept = {n: t for n, t in tensors.items() if not n.startswith(f"{name}.")}
        return kept | {f"{name}.weight": weight.half()}

    edit_tensors(folder, plain)
    set_field(folder, dynamic={r"-:.*layers\.0\..*o_proj": {}})
    with gptq.load(folder, device="cpu", backend="reference", plugins=plugins()) as model:
        assert model.plan.kernels() == {"reference": 13}
        assert not model.warnings
        found = model.model.get_submodule(name)
        assert type(found) is torch.nn.Linear
        torch.testing.assert_close(found.weight.float(), weight.half().float())


def test_a_quantised_head(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    tensors, weight = packed_layer("lm_head", 128, 384, bits=4, g_idx=np.arange(128) // 32)
    edit_tensors(
        folder, lambda it: {n: t for n, t in it.items() if n != "lm_head.weight"} | tensors
    )
    set_field(folder, lm_head=True)
    with gptq.load(folder, device="cpu", backend="reference", plugins=plugins()) as model:
        assert model.plan.kernels() == {"reference": 15}
        x = torch.randn(2, 128)
        assert error(model.model.lm_head(x), x @ weight.t()) < 1e-5


def test_tied_embeddings_are_one_tensor(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    edit_tensors(folder, lambda it: {n: t for n, t in it.items() if n != "lm_head.weight"})
    edit_json(folder / "config.json", lambda it: it.update(tie_word_embeddings=True))
    with gptq.load(folder, device="cpu", plugins=plugins()) as model:
        head, embedding = model.model.lm_head.weight, model.model.model.embed_tokens.weight
        assert head.data_ptr() == embedding.data_ptr()


@pytest.mark.parametrize("name", NAMES)
def test_every_field_says_where_it_came_from(name: str, tmp_path: Path) -> None:
    folder = copy(name, tmp_path)
    sources = GPTQReader().open(folder).config.sources
    for field in ("bits", "group_size", "desc_act", "sym"):
        assert sources[field] == "quantize_config.json"
    assert sources["damp_percent"] == "quantize_config.json, meta"
    (folder / "quantize_config.json").rename(folder / "quant_config.json")
    assert GPTQReader().open(folder).config.sources["bits"] == "quant_config.json"
    (folder / "quant_config.json").unlink()
    assert GPTQReader().open(folder).config.sources["bits"] == "config.json"
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    without_config(folder)
    config = GPTQReader().open(folder).config
    for field in ("bits", "group_size", "sym"):
        assert getattr(config, field) == stored[field]
        assert config.sources[field] == "tensors"
    if stored["group_size"] > 0:  # else the flag changes no number
        assert config.desc_act == stored["desc_act"]


def test_two_configs_that_disagree_are_told_apart(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    edit_json(folder / "config.json", lambda it: it["quantization_config"].update(group_size=64))
    warnings = GPTQReader().open(folder).warnings
    assert warnings == (
        (
            "group_size is 32 in quantize_config.json and 64 in config.json; "
            "quantize_config.json is followed"
        ),
    )


def test_autogptq_of_2023_wrote_less(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    config = {
        "bits": 4, "group_size": 32, "damp_percent": 0.1, "desc_act": True, "static_groups": False,
        "sym": True, "true_sequential": True, "model_name_or_path": None,
        "model_file_base_name": "gptq_model-4bit-32g",
    }  # fmt: skip
    (folder / "quantize_config.json").write_text(json.dumps(config))
    edit_json(folder / "config.json", lambda it: it.pop("quantization_config"))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    (folder / "another.safetensors").write_bytes(b"not read")
    checkpoint = GPTQReader().open(folder)
    assert not checkpoint.warnings
    assert (checkpoint.config.checkpoint_format, checkpoint.config.zeros) == ("gptq", "v1")
    assert checkpoint.config.damp_percent == 0.1
