"""The parts of the plug-in for vLLM that need no vLLM: cutting, joining, names, and its words."""

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
from gptq_loader_extensions.vllm.error_messages import in_words
from gptq_loader_extensions.vllm.layers.shards import (
    Cut,
    Piece,
    cut_pieces,
    describe,
    even_cut,
    join,
    take,
)
from gptq_loader_extensions.vllm.layers.tensor_collector import PARTS, Arrivals, empty_parameter
from gptq_loader_extensions.vllm.planning.names import Names
from gptq_loader_plugin.checkpoint.reader import GPTQReader
from gptq_loader_plugin.errors import OptionInvalid, TensorMismatch, UnsupportedFormat

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
NAMES = sorted(it.name for it in DATA.glob("gptq*"))
BLOCK = "model.layers.0"
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Mapper:
    """Stands where vLLM's WeightsMapper does: a prefix, and what is dropped."""

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
        piece = Piece(layer, (0,), ((0, layer.out_features),), rows)
        taken = take(packed, piece)
        assert torch.equal(taken.dequantize(), weight[:, slice(*rows)])
        assert len(taken.scales) == len(taken.g_idx.unique())
        spec = describe(taken, layer, name="half")
        assert (spec.in_features, spec.out_features) == (half, layer.out_features)
        assert spec.groups == len(taken.scales)
        assert spec.group_rows[0] > 0


@pytest.mark.parametrize("name", NAMES)
def test_workers_columns_are_those_of_the_whole_wherever_they_are_cut(name: str) -> None:
    checkpoint = GPTQReader().open(DATA / name)
    layer = checkpoint.layers[f"{BLOCK}.mlp.gate_proj"]
    packed = checkpoint.packed(layer.name)
    columns = ((3, 50), (101, 120))
    taken = take(packed, Piece(layer, (0, 1), columns, (0, layer.in_features)))
    weight = packed.dequantize()
    assert torch.equal(taken.dequantize(), torch.cat([weight[3:50], weight[101:120]]))


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


def test_what_is_fused_in_the_file_is_cut_part_by_part() -> None:
    checkpoint = GPTQReader().open(DATA / "gptq-4bit-32g-act-sym")
    gate = checkpoint.layers[f"{BLOCK}.mlp.gate_proj"]
    half = gate.out_features // 2  # as if gate and up were stored as one
    sizes, columns = even_cut([half // 2, half // 2], columns=gate.out_features, rank=1, workers=2)
    cut = Cut(gate.in_features, sizes, columns, (0, gate.in_features), 2)
    (piece,) = cut_pieces([gate], cut, path=DATA)
    assert piece.parts == (0, 1)
    assert piece.columns == ((half // 2, half), (half + half // 2, 2 * half))


def test_a_cut_through_a_packed_word_is_refused_with_the_sizes_that_work() -> None:
    checkpoint = GPTQReader().open(DATA / "gptq_v2-3bit-64g-act-asym")
    down = checkpoint.layers[f"{BLOCK}.mlp.down_proj"]
    assert down.in_features == 192
    cut = Cut(192, (down.out_features,), ((0, down.out_features),), (48, 96), 4)
    with pytest.raises(OptionInvalid, match="4 workers would take 48 each; 3-bit codes") as found:
        cut_pieces([down], cut, path=DATA)
    assert found.value.hint.startswith("use a tensor parallel size of 1 or 2 or 3 or 6,")


def test_another_shape_than_the_models_is_an_error() -> None:
    checkpoint = GPTQReader().open(DATA / "gptq-4bit-32g-act-sym")
    down = checkpoint.layers[f"{BLOCK}.mlp.down_proj"]
    cut = Cut(192, (down.out_features + 8,), ((0, down.out_features + 8),), (0, 192))
    with pytest.raises(TensorMismatch, match="vLLM's model has 192 rows and 136 columns"):
        cut_pieces([down], cut, path=DATA)


def test_columns_shared_in_an_unknown_way_are_refused() -> None:
    with pytest.raises(OptionInvalid, match="is no way to share"):
        even_cut([48], columns=128, rank=0, workers=2)
    assert even_cut([128], columns=128, rank=1, workers=2) == ((128,), ((0, 128),))


def test_names_follow_the_models_renaming_and_fusing() -> None:
    stored = [f"{BLOCK}.self_attn.{it}" for it in (*FUSED["qkv_proj"], "o_proj")]
    names = Names([*stored, "model.mtp.0.proj"], DATA)
    names.rename(Mapper())
    assert names.claim("language_model.model.layers.0.self_attn.qkv_proj", FUSED) == stored[:3]
    assert names.claim("language_model.model.layers.0.self_attn.o_proj", FUSED) == stored[3:]
    assert names.claim("language_model.model.layers.0.mlp.gate_up_proj", FUSED) == []
    assert names.check_claimed() == ["model.mtp.0.proj"]  # a part the model lacks


def test_a_quantised_layer_that_no_module_takes_is_an_error() -> None:
    names = Names([f"{BLOCK}.self_attn.o_proj", f"{BLOCK}.mlp.down_proj"], DATA)
    names.claim(f"{BLOCK}.mlp.down_proj", FUSED)
    with pytest.raises(TensorMismatch, match="o_proj is quantised, and vLLM's model has no"):
        names.check_claimed()


def test_layers_that_are_joined_must_all_be_quantised() -> None:
    names = Names([f"{BLOCK}.mlp.gate_proj"], DATA)
    with pytest.raises(UnsupportedFormat, match="up_proj is not; vLLM joins the two"):
        names.claim(f"{BLOCK}.mlp.gate_up_proj", FUSED)


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_complete_with_its_last_tensor_and_as_the_reader_reads_it(name: str) -> None:
    checkpoint = GPTQReader().open(DATA / name)
    layer = f"{BLOCK}.mlp.down_proj"
    arrivals = Arrivals(checkpoint)
    *first, last = [it for it in PARTS if arrivals.expects(it, [layer])]
    for part in first:
        assert arrivals.add(layer, part, checkpoint.tensor(f"{layer}.{part}")) is None
    with pytest.raises(TensorMismatch, match=f"{last} did not arrive"):
        arrivals.check_complete([layer])
    packed = arrivals.add(layer, last, checkpoint.tensor(f"{layer}.{last}"))
    assert packed is not None
    assert torch.equal(packed.dequantize(), checkpoint.packed(layer).dequantize())
    arrivals.check_complete([layer])
    with pytest.raises(TensorMismatch, match=f"{last} arrived twice"):
        arrivals.add(layer, last, checkpoint.tensor(f"{layer}.{last}"))


def test_a_tensor_of_another_shape_is_an_error() -> None:
    checkpoint = GPTQReader().open(DATA / "gptq-4bit-32g-act-sym")
    layer = f"{BLOCK}.mlp.down_proj"
    half = checkpoint.tensor(f"{layer}.scales")[:1]
    with pytest.raises(TensorMismatch, match=r"scales arrived as \[1, 128\], and is not that"):
        Arrivals(checkpoint).add(layer, "scales", half)


def test_a_parameter_holds_nothing_and_hands_on_what_comes() -> None:
    given: list[Any] = []
    parameter: Any = empty_parameter("scales", "bfloat16", lambda *it: given.append(it))
    parameter.weight_loader(parameter, torch.ones(2))
    assert parameter.numel() == 0
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(given[0][1], torch.ones(2))


def test_errors_reach_vllms_users_with_the_next_step() -> None:
    with pytest.raises(ValueError, match=r"gptq_loader: no such\nhint: ask for less"), in_words():
        raise OptionInvalid("no such", hint="ask for less")


def test_the_host_is_offered_and_importing_it_is_free() -> None:
    assert [it.name for it in gptq_hosts()] == ["vllm"]
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
    assert "vLLM is not installed" in caplog.text or "was written for vLLM 0.32" in caplog.text
    with pytest.raises(gptq.PluginError) as found:
        VllmHost().install()
    assert "install vLLM 0.32" in found.value.hint
    with pytest.raises(OptionInvalid, match="has no option port"):
        VllmHost().install(port=1)
