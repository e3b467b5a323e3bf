"""Families of every kind, from published checkpoints: `make families` tries them all."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import error
from published import Experts, dequantised, publish
from round_trip import IDS, generate_logits, logits, round_trip
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptq_loader_plugin.errors import TensorMismatch
from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.loading import load, load_model
from gptq_loader_plugin.model.float32 import kept_in_float32
from gptq_loader_plugin.quantize.blocks import (
    find_blocks,
    record_calls,
    run_block,
    separate_experts,
)
from gptq_loader_plugin.quantize.source import load_source
from gptq_loader_plugin.quantize.writer import left_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from published import Published

SAMPLE = (
    "deepseek_v4",  # a gate that clamps
    "falcon_h1", "gpt2", "gpt_oss", "granitemoe",
    "inkling2_text",  # weights that its files name without .weight
    "kimi_linear", "llama4_text", "longcat_flash",
    "minimax_m3_vl",  # gate and up in one, and several layers in its files
    "nemotron_h",  # experts without a gate
    "qwen3_next",
    "qwen3_vl",  # pictures
    "reformer",  # two streams from block to block
    "sarvam_moe",  # queries, keys and values that the class splits
    "zamba2",  # one block in several layers
    "zaya",  # a router that reads the one before it
)  # fmt: skip


@pytest.mark.parametrize("model_type", SAMPLE)
def test_its_published_checkpoint_loads_and_it_is_quantised(
    model_type: str, tmp_path: Path
) -> None:
    row = round_trip(model_type, tmp_path)
    assert (row.loads, row.decodes) == ("exact", "exact"), row.notes
    assert row.quantises == "exact", row.notes


@pytest.mark.parametrize(
    "model_type",
    [
        "inkling2_text",  # weights that its files name without .weight
        "llama",
        "reformer",  # two streams from block to block
        "zaya",  # a router that reads the one before it
    ],
)
def test_a_quantised_block_reads_what_the_model_gives_it(model_type: str, tmp_path: Path) -> None:
    model, _ = load_source(publish(model_type, tmp_path).original)
    separate_experts(model)
    blocks = find_blocks(model)
    expected: dict[str, torch.Tensor] = {}

    def note(path: str) -> Callable[[object, object, object], None]:
        def hook(_module: object, _inputs: object, output: Any) -> None:
            expected[path] = output if isinstance(output, torch.Tensor) else output[0].clone()

        return hook

    batch = torch.tensor([IDS, IDS[::-1]])
    handles = [block.module.register_forward_hook(note(block.path)) for block in blocks]
    with torch.inference_mode():
        model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    (hidden,), calls = record_calls(model, blocks, [batch])
    for i, block in enumerate(blocks):
        hidden, output = run_block(block, hidden, calls[i][0])
        assert error(hidden, expected[block.path]) < 1e-5
        if i + 1 < len(blocks):
            calls[i + 1][0] = calls[i + 1][0].after(output)


def test_experts_named_as_gptqmodel_names_those_of_gpt_oss(tmp_path: Path) -> None:
    """gate_up.3 has both, interleaved, and down.3 the rest."""
    published = publish("gpt_oss", tmp_path)
    expected = logits(dequantised(published.packed, published, tmp_path / "right"), IDS)
    edit(published, as_gptqmodel(published))
    found = logits(load_model(published.packed, options()).model, IDS)
    assert error(found, expected) < 1e-4


def as_gptqmodel(published: Published) -> dict[str, torch.Tensor]:
    tensors = load_file(published.packed / "model.safetensors")
    for experts in published.fused.values():
        if experts.bias:
            continue
        for i in range(4):
            join_expert(tensors, experts, i)
    return tensors


def join_expert(tensors: dict[str, torch.Tensor], experts: Experts, i: int) -> None:
    parts = [f"{experts.prefix}.{i}.{role}_proj" for role in experts.roles]
    name = f"{experts.prefix}.{'_'.join(experts.roles)}.{i}"
    shifts = torch.arange(0, 32, 4)
    for part in ("qweight", "scales", "bias"):
        own = [tensors.pop(f"{it}.{part}") for it in parts]
        tensors[f"{name}.{part}"] = torch.stack(own, -1).flatten(-2).contiguous()
    zeros = [tensors.pop(f"{it}.qzeros") for it in parts]
    tensors[f"{name}.qzeros"] = torch.cat(zeros, -1)  # all of them are the same
    assert len((tensors[f"{name}.qzeros"][..., None] >> shifts & 15).unique()) == 1
    for it in parts:  # the same in all of them
        tensors[f"{name}.g_idx"] = tensors.pop(f"{it}.g_idx")


def test_a_layer_beside_another_that_is_too_narrow_is_a_mismatch(tmp_path: Path) -> None:
    published = publish("minimax_m3_vl", tmp_path)
    tensors = load_file(published.packed / "model.safetensors")
    layer = "language_model.model.layers.0.block_sparse_moe.shared_experts.up_proj"
    for part, columns in (("qweight", 32), ("scales", 32), ("qzeros", 4)):
        tensors[f"{layer}.{part}"] = tensors[f"{layer}.{part}"][:, :columns].contiguous()
    edit(published, tensors)
    with pytest.raises(TensorMismatch, match=r"makes up a layer of 128x96 .* makes it 128x128"):
        load_model(published.packed, options())


def test_an_expert_beyond_the_last_is_a_mismatch(tmp_path: Path) -> None:
    published = publish("qwen3_moe", tmp_path)
    tensors = load_file(published.packed / "model.safetensors")
    more = {it.replace("experts.3.", "experts.4."): tensors[it].clone() for it in tensors}
    edit(published, {**more, **tensors})
    with pytest.raises(TensorMismatch, match="beyond the 4"):
        load_model(published.packed, options())


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_a_packed_layer_of_multi_token_prediction_is_left(model_type: str, tmp_path: Path) -> None:
    published = publish(model_type, tmp_path)
    expected = logits(dequantised(published.packed, published, tmp_path / "right"), IDS)
    tensors = load_file(published.packed / "model.safetensors")
    more = {it.replace("layers.1.", "layers.2."): tensors[it].clone() for it in tensors}
    edit(published, {**more, **tensors}, num_nextn_predict_layers=1)
    loaded = load_model(published.packed, options())
    assert error(logits(loaded.model, IDS), expected) < 1e-4
    assert "not read: model.layers.2" in " ".join(loaded.warnings)


def test_a_layer_that_nothing_announces_is_still_a_mismatch(tmp_path: Path) -> None:
    published = publish("llama", tmp_path)
    tensors = load_file(published.packed / "model.safetensors")
    more = {it.replace("layers.1.", "layers.2."): tensors[it].clone() for it in tensors}
    edit(published, {**more, **tensors})
    with pytest.raises(TensorMismatch, match="no such layer"):
        load_model(published.packed, options())


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe"])
def test_what_transformers_keeps_in_float32_is_not_rounded(model_type: str, tmp_path: Path) -> None:
    published = publish(model_type, tmp_path)
    tensors = load_file(published.packed / "model.safetensors")
    name = next(it for it in tensors if it.endswith("e_score_correction_bias"))
    tensors[name] = 8 + 0.1 * torch.randn(4)
    edit(published, tensors)
    loaded = load_model(
        published.packed, LoadOptions(backend="dense", device="cpu", dtype="bfloat16")
    )
    kept = loaded.model.state_dict()[name]
    assert kept.dtype == torch.float32
    assert torch.equal(kept, tensors[name])
    right = AutoModelForCausalLM.from_pretrained(published.original, dtype=torch.bfloat16)
    theirs = {it: tensor.dtype for it, tensor in right.state_dict().items()}
    ours = {it: tensor.dtype for it, tensor in loaded.model.state_dict().items()}
    assert {it: theirs[it] for it in ours if it in theirs} == {
        it: ours[it] for it in ours if it in theirs
    }


def test_the_quantiser_writes_it_in_float32(tmp_path: Path) -> None:
    published = publish("glm4_moe", tmp_path)
    quantised = gptq_quantize(published.original, tmp_path / "ours")
    name = next(it for it in quantised if it.endswith("e_score_correction_bias"))
    model = AutoModelForCausalLM.from_pretrained(published.original)
    pattern = kept_in_float32(model, torch.float16)
    assert pattern is not None
    assert {quantised[it].dtype for it in quantised if pattern.search(it)} == {torch.float32}
    assert quantised[name].dtype == torch.float32


def gptq_quantize(source: Path, out: Path) -> dict[str, torch.Tensor]:
    from gptq_loader_plugin.quantize.options import QuantizeOptions
    from gptq_loader_plugin.quantize.run import quantize

    model, tokenizer = load_source(source)
    quantize(model, tokenizer, out, options=QuantizeOptions(group_size=32), samples=[IDS, IDS])
    return load_file(out / "model.safetensors")


def test_experts_that_stay_in_one_tensor_are_named(tmp_path: Path) -> None:
    gptq_quantize(publish("dbrx", tmp_path).original, tmp_path / "ours")
    left = left_of(tmp_path / "ours")
    assert left["transformer.blocks.1.ffn.experts.mlp.w2"] == "all experts in one tensor"


def test_a_block_in_several_layers_is_written_once(tmp_path: Path) -> None:
    published = publish("zamba2", tmp_path)
    names = {it.rpartition(".")[0] for it in gptq_quantize(published.original, tmp_path / "ours")
             if it.endswith(".qweight") and "shared_transf" in it}  # fmt: skip
    assert names
    assert len({it.split(".shared_transf")[0] for it in names}) == 1


def test_a_head_that_only_the_model_around_it_ties(tmp_path: Path) -> None:
    """The inner config says nothing, and transformers' own default for it is that they are not."""
    published = publish("mistral3", tmp_path)
    config = json.loads((published.packed / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("tie_word_embeddings", None)
    (published.packed / "config.json").write_text(json.dumps(config))
    assert not any("lm_head" in it for it in load_file(published.packed / "model.safetensors"))
    expected = logits(dequantised(published.packed, published, tmp_path / "right"), IDS)
    loaded = load_model(published.packed, options())
    assert error(logits(loaded.model, IDS), expected) < 1e-4
    assert loaded.model.config.tie_word_embeddings


def test_a_prompt_whose_tokens_see_those_after_them_is_read_whole(tmp_path: Path) -> None:
    """A kept prefix, whose end saw less, would answer otherwise; so would parts of a prompt."""
    published = publish("paligemma", tmp_path)
    reference = dequantised(published.packed, published, tmp_path / "right")
    loaded = load(published.packed, backend="reference", device="cpu", dtype="float32")
    steps = 5
    for ids in (IDS[:16], IDS, IDS):
        seen: list[torch.Tensor] = []
        reply = loaded.begin(
            ids,
            GenerateOptions(max_new_tokens=steps, temperature=0.0),
            watch=lambda _, own, seen=seen: seen.append(own[0].float()),
        )
        while not reply.finished:
            reply.sample(reply.forward_pending(max_tokens=7))
        reply.close()
        right = generate_logits(reference, ids, steps)
        assert len(seen) == steps
        assert error(torch.stack(seen), right) < 1e-5


def options() -> LoadOptions:
    return LoadOptions(backend="reference", device="cpu", dtype="float32")


def edit(published: Published, tensors: dict[str, torch.Tensor], **fields: object) -> None:
    """Write other tensors into the packed checkpoint, and other fields into its config."""
    save_file(tensors, published.packed / "model.safetensors", metadata={"format": "pt"})
    file = published.packed / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
