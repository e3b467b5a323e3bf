"""Packed layers that belong to no linear layer: a mixture's router, an embedding."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from altered import DATA, PLUGINS, edit_tensors, error
from family_checkpoints import IDS, Packed
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

import gptq_loader_plugin as gptq
from gptq_loader_plugin.model.linears import linear_shape

if TYPE_CHECKING:
    from pathlib import Path

SMALL = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 380, "eos_token_id": 381, "pad_token_id": 382,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4, "n_routed_experts": 32, "n_shared_experts": 1,
    "first_k_dense_replace": 0, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 32, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "mixtral": {"num_local_experts": 32, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 32, "num_experts_per_tok": 2},
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, "n_group": 4, "topk_group": 2},
}


def packed(weight: torch.Tensor) -> Packed:
    """Random codes for a weight [N, K]."""
    generator = np.random.default_rng(0)
    columns, rows = weight.shape
    groups = rows // 32
    return Packed(
        generator.integers(0, 16, (rows, columns), dtype=np.uint8),
        generator.integers(4, 12, (groups, columns), dtype=np.uint8),
        torch.from_numpy(generator.uniform(0.005, 0.02, (groups, columns))).half(),
        torch.from_numpy(generator.permutation(rows) % groups).int(),
        None,
        4,
    )


def publish(folder: Path, kind: str, names: tuple[str, ...], **fields: Any) -> Any:
    """Write a checkpoint with these modules packed; return the model that answers the same."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SMALL, **fields})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.08)
        parameter.data = parameter.data.half().float()
    layers = {}
    for name in names:
        module = model.get_submodule(name)
        layers[name] = packed(module.weight)
        module.weight.data = layers[name].weight()
    model.save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    tensors = {name: it.clone() for name, it in stored.items()}
    for name, layer in layers.items():
        saved = name if f"{name}.weight" in tensors else name.replace("mlp", "block_sparse_moe")
        del tensors[f"{saved}.weight"]
        tensors |= layer.tensors(saved)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(content))
    for file in (DATA / "base").glob("*token*"):
        shutil.copy(file, folder)
    return model


def load(folder: Path, **options: Any) -> Any:
    return gptq.load(folder, device="cpu", dtype="float32", plugins=plugins(), **options)


def plugins() -> gptq.Plugins:
    return gptq.Plugins(installed=True, environ=PLUGINS)


def logits_error(loaded: Any, model: Any) -> float:
    with torch.inference_mode():
        return error(loaded.model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_quantised_router_is_dequantised(kind: str, tmp_path: Path) -> None:
    names = ("model.layers.0.mlp.gate", "model.layers.0.self_attn.o_proj")
    model = publish(tmp_path, kind, names, **MIXTURES[kind])
    plan = gptq.explain(tmp_path, device="cpu", plugins=plugins())
    assert len(plan.dequantized) == 1
    assert len(plan.choices) == 1
    assert plan.dequantized[0].name in plan.explain()
    assert plan.to_json()["dequantized"] == [plan.dequantized[0].name]
    with load(tmp_path, backend="reference") as loaded:
        assert logits_error(loaded, model) < 1e-5
        assert [it.name for it in loaded.plan.dequantized] == [plan.dequantized[0].name]
        assert any("dequantised" in note for note in loaded.notes)
        router = 32 * 64 * 4
        assert loaded.plan.weight_bytes >= router
        assert loaded.model.get_submodule("model.layers.0.mlp.gate").weight.dtype == torch.float32


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_embedding_is_dequantised(tied: bool, tmp_path: Path) -> None:
    names = ("model.embed_tokens", "model.layers.0.mlp.up_proj")
    model = publish(tmp_path, "llama", names, tie_word_embeddings=tied)
    with load(tmp_path) as loaded:
        assert logits_error(loaded, model) < 1e-3
        assert [it.name for it in loaded.plan.dequantized] == ["model.embed_tokens"]


def test_a_model_with_nothing_else_quantised_loads(tmp_path: Path) -> None:
    model = publish(tmp_path, "llama", ("model.embed_tokens",))
    assert gptq.explain(tmp_path, device="cpu", plugins=plugins()).kernels() == {}
    with load(tmp_path) as loaded:
        assert logits_error(loaded, model) < 1e-5


def test_the_plan_counts_what_is_dequantised(tmp_path: Path) -> None:
    publish(tmp_path, "llama", ("model.embed_tokens", "model.layers.0.mlp.up_proj"))
    plan = gptq.explain(tmp_path, device="cpu", backend="reference", plugins=plugins())
    with load(tmp_path, backend="reference") as loaded:
        there = sum(it.nbytes for it in loaded.model.parameters())
    size = 4 if plan.dtype == "float32" else 2
    embedding = 384 * 64 * size
    assert plan.weight_bytes > embedding
    packed_part = plan.choices[0].chosen.prepared_bytes
    assert plan.weight_bytes - packed_part == there * size // 4


def test_several_places_count_it_too(tmp_path: Path) -> None:
    model = publish(tmp_path, "llama", ("model.embed_tokens", "model.layers.0.mlp.up_proj"))
    map_ = {"": "cpu", "model.embed_tokens": "disk"}
    offload = tmp_path / "offload"
    with gptq.load(
        tmp_path, device_map=map_, offload_folder=offload, backend="reference", dtype="float32",
        plugins=plugins(),
    ) as loaded:  # fmt: skip
        assert logits_error(loaded, model) < 1e-5
        assert loaded.plan.place_bytes["disk"] == 384 * 64 * 4
    limits = {"cpu": "1GB"}
    plan = gptq.explain(tmp_path, device_map="auto", max_memory=limits, plugins=plugins())
    assert plan.dequantized


def test_a_module_that_a_name_does_not_tell_of_is_dequantised_at_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan that a load made by names is mended by the model."""
    monkeypatch.setattr("gptq_loader_plugin.planning.dequantized.ROUTERS", ())
    names = ("model.layers.0.mlp.gate", "model.layers.0.self_attn.o_proj")
    model = publish(tmp_path, "qwen3_moe", names, **MIXTURES["qwen3_moe"])
    before = gptq.explain(tmp_path, device="cpu", backend="reference", plugins=plugins())
    assert before.dequantized == ()
    with load(tmp_path, backend="reference") as loaded:
        assert logits_error(loaded, model) < 1e-5
        assert [it.name for it in loaded.plan.dequantized] == [names[0]]
        assert [it.layer.name for it in loaded.plan.choices] == [names[1]]


@pytest.mark.parametrize("kind", ["phimoe", "llama4"])
def test_a_router_that_derives_from_a_linear_is_one(kind: str) -> None:
    if kind == "phimoe":
        from transformers.models.phimoe.configuration_phimoe import PhimoeConfig as Config
        from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter as Router
    else:
        from transformers.models.llama4.configuration_llama4 import Llama4TextConfig as Config
        from transformers.models.llama4.modeling_llama4 import Llama4Router as Router
    router = Router(Config(hidden_size=64, num_local_experts=8))
    assert isinstance(router, torch.nn.Linear)
    assert linear_shape(router) is None


def test_a_linear_of_a_class_of_its_own_is_one() -> None:
    assert linear_shape(FalconLinear(64, 32)) == (64, 32)


@pytest.mark.parametrize("fault", ["rows", "bias"])
def test_what_does_not_fit_is_named(fault: str, tmp_path: Path) -> None:
    publish(tmp_path, "llama", ("model.embed_tokens", "model.layers.0.mlp.up_proj"))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.embed_tokens"
        if fault == "bias":
            tensors[f"{name}.bias"] = torch.ones(384).half()
        else:
            other = packed(torch.zeros(384, 32)).tensors(name)
            tensors.update(other)

    edit_tensors(tmp_path, edit)
    with pytest.raises(gptq.TensorMismatch, match="embed_tokens"):
        load(tmp_path)
