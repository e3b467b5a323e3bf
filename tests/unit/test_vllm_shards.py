"""The parts of the plug-in for vLLM that need no vLLM: slices, joins, names, and messages."""

from __future__ import annotations

import builtins
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_process

import gptq_loader_plugin as gptq
from gptq_loader_extensions.vllm import VllmHost, gptq_hosts, register
from gptq_loader_extensions.vllm.error_messages import as_value_error
from gptq_loader_extensions.vllm.layers.shards import (
    LayerSlice,
    Partition,
    describe,
    even_partition,
    join,
    slice_layers,
    slice_packed,
)
from gptq_loader_extensions.vllm.layers.tensor_collector import (
    PARTS,
    TensorCollector,
    empty_parameter,
)
from gptq_loader_extensions.vllm.planning.layer_names import LayerNames
from gptq_loader_plugin.checkpoint.reader import GPTQReader
from gptq_loader_plugin.errors import OptionInvalid, TensorMismatch, UnsupportedFormat

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
NAMES = sorted(it.name for it in DATA.glob("gptq*"))
BLOCK = "model.layers.0"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Mapper:
    """A stand-in for vLLM's WeightsMapper: a prefix, and tensors that are dropped."""

    def map_name(self, key: str) -> str | None:
        if ".mtp." in key:
            return None
        return key.replace("model.", "language_model.model.", 1)


@pytest.mark.parametrize("name", NAMES)
def test_two_workers_rows_multiply_to_the_whole(name: str) -> None:
    checkpoint = GPTQReader().open(DATA / name)
    layer = checkpoint.layers[f"{BLOCK}.mlp.down_proj"]
    packed = checkpoint.packed(layer.name)
    weight, half = packed.dequantize(), layer.in_features // 2
    for rows in ((0, half), (half, 2 * half)):
        layer_slice = LayerSlice(layer, (0,), ((0, layer.out_features),), rows)
        part = slice_packed(packed, layer_slice)
        assert torch.equal(part.dequantize(), weight[:, slice(*rows)])
        assert len(part.scales) == len(part.g_idx.unique())
        spec = describe(part, layer, name="half")
        assert (spec.in_features, spec.out_features) == (half, layer.out_features)
        assert spec.groups == len(part.scales)
        assert spec.group_rows[0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_workers_columns_are_those_of_the_whole_at_any_boundary(name: str) -> None:
    checkpoint = GPTQReader().open(DATA / name)
    layer = checkpoint.layers[f"{BLOCK}.mlp.gate_proj"]
    packed = checkpoint.packed(layer.name)
    columns = ((3, 50), (101, 120))
    part = slice_packed(packed, LayerSlice(layer, (0, 1), columns, (0, layer.in_features)))
    weight = packed.dequantize()
    assert torch.equal(part.dequantize(), torch.cat([weight[3:50], weight[101:120]]))


def test_layers_with_the_same_groups_become_one_and_others_stay() -> None:
    checkpoint = GPTQReader().open(DATA / "gptq-4bit-32g-act-sym")
    q, k = (checkpoint.packed(f"{BLOCK}.self_attn.{it}_proj") for it in "qk")
    bias = torch.arange(k.scales.shape[1], dtype=torch.float16)
    (joined,) = join([q, replace(k, bias=bias)])
    assert torch.equal(joined.dequantize(), torch.cat([q.dequantize(), k.dequantize()]))
    assert joined.bias is not None
    assert torch.equal(joined.bias[-len(bias) :], bias.float())
    assert not joined.bias[: -len(bias)].any()
    other = replace(k, g_idx=k.g_idx.flip(0))
    assert join([q, other]) == [q, other]


def test_what_is_fused_in_the_file_is_sliced_part_by_part() -> None:
    checkpoint = GPTQReader().open(DATA / "gptq-4bit-32g-act-sym")
    gate = checkpoint.layers[f"{BLOCK}.mlp.gate_proj"]
    half = gate.out_features // 2  # as if gate and up were stored as one
    sizes, columns = even_partition(
        [half // 2, half // 2], columns=gate.out_features, rank=1, workers=2
    )
    partition = Partition(gate.in_features, sizes, columns, (0, gate.in_features), 2)
    (layer_slice,) = slice_layers([gate], partition, path=DATA)
    assert layer_slice.parts == (0, 1)
    assert layer_slice.columns == ((half // 2, half), (half + half // 2, 2 * half))


def test_a_boundary_inside_a_packed_word_is_refused_with_the_sizes_that_work() -> None:
    checkpoint = GPTQReader().open(DATA / "gptq_v2-3bit-64g-act-asym")
    down = checkpoint.layers[f"{BLOCK}.mlp.down_proj"]
    assert down.in_features == 192
    partition = Partition(192, (down.out_features,), ((0, down.out_features),), (48, 96), 4)
    with pytest.raises(OptionInvalid, match="48 for each of 4 workers; 3-bit codes") as error:
        slice_layers([down], partition, path=DATA)
    assert error.value.hint.startswith("use a tensor parallel size of 1 or 2 or 3 or 6,")


def test_another_shape_than_the_models_is_an_error() -> None:
    checkpoint = GPTQReader().open(DATA / "gptq-4bit-32g-act-sym")
    down = checkpoint.layers[f"{BLOCK}.mlp.down_proj"]
    partition = Partition(192, (down.out_features + 8,), ((0, down.out_features + 8),), (0, 192))
    with pytest.raises(TensorMismatch, match="vLLM's model has 192 rows and 136 columns"):
        slice_layers([down], partition, path=DATA)


def test_columns_that_are_not_partitioned_evenly_are_refused() -> None:
    with pytest.raises(OptionInvalid, match="is not an even partition"):
        even_partition([48], columns=128, rank=0, workers=2)
    assert even_partition([128], columns=128, rank=1, workers=2) == ((128,), ((0, 128),))


def test_names_follow_the_models_renaming_and_fusing() -> None:
    stored = [f"{BLOCK}.self_attn.{it}" for it in (*FUSED["qkv_proj"], "o_proj")]
    names = LayerNames([*stored, "model.mtp.0.proj"], DATA)
    names.rename(Mapper())
    assert names.claim("language_model.model.layers.0.self_attn.qkv_proj", FUSED) == stored[:3]
    assert names.claim("language_model.model.layers.0.self_attn.o_proj", FUSED) == stored[3:]
    assert names.claim("language_model.model.layers.0.mlp.gate_up_proj", FUSED) == []
    assert names.check_claimed() == ["model.mtp.0.proj"]  # a part the model lacks


def test_a_quantised_layer_that_no_module_takes_is_an_error() -> None:
    names = LayerNames([f"{BLOCK}.self_attn.o_proj", f"{BLOCK}.mlp.down_proj"], DATA)
    names.claim(f"{BLOCK}.mlp.down_proj", FUSED)
    with pytest.raises(TensorMismatch, match="o_proj is quantised, and vLLM's model has no"):
        names.check_claimed()


def test_a_layer_that_vllm_keeps_plain_is_claimed_once_it_is_dequantised() -> None:
    router, other = f"{BLOCK}.block_sparse_moe.gate", "model.mtp.0.proj"
    names = LayerNames([f"{BLOCK}.self_attn.o_proj", router, other], DATA)
    names.claim(f"{BLOCK}.self_attn.o_proj", FUSED)
    assert names.unclaimed_in_blocks() == [router]  # the model has no block of the other
    names.claim_plain(router)
    assert names.unclaimed_in_blocks() == []
    assert names.check_claimed() == [other]


def test_layers_that_are_fused_must_all_be_quantised() -> None:
    names = LayerNames([f"{BLOCK}.mlp.gate_proj"], DATA)
    with pytest.raises(UnsupportedFormat, match="up_proj is not; vLLM fuses the two"):
        names.claim(f"{BLOCK}.mlp.gate_up_proj", FUSED)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_complete_with_its_last_tensor_and_as_the_reader_reads_it(name: str) -> None:
    checkpoint = GPTQReader().open(DATA / name)
    layer = f"{BLOCK}.mlp.down_proj"
    collector = TensorCollector(checkpoint)
    *first, last = [part for part in PARTS if collector.expects(part, [layer])]
    for part in first:
        assert collector.add(layer, part, checkpoint.tensor(f"{layer}.{part}")) is None
    with pytest.raises(TensorMismatch, match=f"{last} did not arrive"):
        collector.check_complete([layer])
    packed = collector.add(layer, last, checkpoint.tensor(f"{layer}.{last}"))
    assert packed is not None
    assert torch.equal(packed.dequantize(), checkpoint.packed(layer).dequantize())
    collector.check_complete([layer])
    with pytest.raises(TensorMismatch, match=f"{last} arrived twice"):
        collector.add(layer, last, checkpoint.tensor(f"{layer}.{last}"))


def test_a_tensor_of_another_shape_is_an_error() -> None:
    checkpoint = GPTQReader().open(DATA / "gptq-4bit-32g-act-sym")
    layer = f"{BLOCK}.mlp.down_proj"
    half = checkpoint.tensor(f"{layer}.scales")[:1]
    with pytest.raises(
        TensorMismatch, match=r"scales arrived as \[1, 128\], which is not its shape"
    ):
        TensorCollector(checkpoint).add(layer, "scales", half)


def test_a_parameter_is_empty_and_passes_on_what_is_loaded() -> None:
    loaded: list[Any] = []
    parameter: Any = empty_parameter("scales", "bfloat16", lambda *args: loaded.append(args))
    parameter.weight_loader(parameter, torch.ones(2))
    assert parameter.numel() == 0
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(loaded[0][1], torch.ones(2))


def test_errors_reach_vllms_users_with_the_next_step() -> None:
    message = r"gptq_loader: no such\nhint: ask for less"
    with pytest.raises(ValueError, match=message), as_value_error():
        raise OptionInvalid("no such", hint="ask for less")


def test_the_host_is_offered_and_importing_it_is_free() -> None:
    assert [host.name for host in gptq_hosts()] == ["vllm"]
    code = (
        "import sys, gptq_loader_extensions.vllm\n"
        "assert not {'torch', 'vllm', 'pydantic'} & set(sys.modules)"
    )
    run_process([sys.executable, "-c", code], check=True)


def test_another_vllm_is_left_alone_with_a_plain_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def older(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("vllm"):
            raise ImportError(f"cannot import {name}", name=name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", older)
    with caplog.at_level(logging.WARNING):
        register()
    assert (
        "vLLM is not installed" in caplog.text or "was written for vLLM 0.32 to 0.33" in caplog.text
    )
    with pytest.raises(gptq.PluginError) as error:
        VllmHost().install()
    assert "install vLLM 0.33" in error.value.hint
    with pytest.raises(OptionInvalid, match="has no option port"):
        VllmHost().install(port=1)
