"""Any architecture: tiny models, quantised by our own quantiser, load and answer exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.reader import GPTQReader
from gptq_loader_plugin.quantize import QuantizeOptions, quantize

BASE = Path(__file__).parents[1] / "data" / "checkpoints" / "base"
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 384,
    "max_position_embeddings": 128,
    "bos_token_id": 380,
    "eos_token_id": 381,
    "pad_token_id": 382,
}
GATED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
MIXTURE = {**SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **MIXTURE, "intermediate_size": 96, "n_routed_experts": 4, "n_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "kv_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip
GPT2 = {
    "n_embd": 64, "n_inner": 96, "n_layer": 2, "n_head": 4, "vocab_size": 384, "n_positions": 128,
    "bos_token_id": 380, "eos_token_id": 381,
}  # fmt: skip
# Name: (config, linears that are quantised).
MODELS: dict[str, tuple[Any, int]] = {
    "bloom": (transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=384), 8),
    "deepseek_v2": (
        transformers.DeepseekV2Config(**LATENT, q_lora_rank=None, topk_method="greedy"),
        26,
    ),
    "deepseek_v3": (transformers.DeepseekV3Config(**LATENT, q_lora_rank=32), 28),
    "falcon": (transformers.FalconConfig(**SIZES), 8),
    "gemma": (transformers.GemmaConfig(**GATED, head_dim=16), 14),
    "gemma2": (transformers.Gemma2Config(**GATED, head_dim=16), 14),
    "gpt2": (transformers.GPT2Config(**GPT2), 8),
    "gpt_neox": (transformers.GPTNeoXConfig(**SIZES, intermediate_size=96), 8),
    "llama": (transformers.LlamaConfig(**GATED), 14),
    "llama_biased": (transformers.LlamaConfig(**GATED, attention_bias=True, mlp_bias=True), 14),
    "llama_tied": (transformers.LlamaConfig(**GATED, tie_word_embeddings=True), 14),
    "mistral": (transformers.MistralConfig(**GATED), 14),
    "mixtral": (transformers.MixtralConfig(**GATED, num_local_experts=4), 32),
    "olmoe": (
        transformers.OlmoeConfig(
            **{**GATED, "intermediate_size": 32}, num_experts=4, num_experts_per_tok=2
        ),
        32,
    ),
    "opt": (transformers.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=64), 12),
    "phi": (transformers.PhiConfig(**SIZES, intermediate_size=96), 12),
    "phi3": (transformers.Phi3Config(**GATED), 8),
    "phimoe": (
        transformers.PhimoeConfig(
            **{**GATED, "intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2
        ),
        32,
    ),
    "qwen2": (transformers.Qwen2Config(**GATED), 14),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig(
            **MIXTURE,
            intermediate_size=96,
            num_key_value_heads=2,
            num_experts=4,
            shared_expert_intermediate_size=32,
        ),
        38,
    ),
    "qwen3": (transformers.Qwen3Config(**GATED, head_dim=16), 14),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig(
            **GATED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
        ),
        32,
    ),
    "starcoder2": (transformers.Starcoder2Config(**GATED), 12),
}
MIXTURES = ("mixtral", "qwen3_moe")
OPTIONS = QuantizeOptions(bits=4, group_size=32, samples=4, seq_len=32)


def tiny_model(name: str) -> Any:
    """A seeded random model whose weights float16 can hold, biases and norms included."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name][0]).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 or "bias" in key:
            parameter.data = torch.randn_like(parameter) * 0.1
        parameter.data = parameter.data.half().float()
    return model


def samples() -> list[list[int]]:
    return torch.randint(0, 380, (4, 32), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=sorted(MODELS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, the model with its quantised weights in place, the checkpoint's folder)."""
    name = request.param
    model = tiny_model(name)
    folder = tmp_path_factory.mktemp(name)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    quantize(model, tokenizer, folder, options=OPTIONS, samples=samples())
    return name, model, folder


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_reference_kernel_answers_as_the_quantised_model_does(made: Any) -> None:
    name, model, folder = made
    ids = torch.tensor(samples()[:1])
    with gptq.load(folder, backend="reference", device="cpu") as loaded, torch.inference_mode():
        assert loaded.plan.kernels() == {"reference": MODELS[name][1]}
        assert relative(loaded.model(ids).logits, model(ids).logits) < 1e-5
        assert not loaded.warnings


def test_what_the_context_takes_is_planned(made: Any) -> None:
    _, _, folder = made
    ids = torch.tensor(samples()[:1])
    with gptq.load(folder, backend="reference", device="cpu") as loaded, torch.inference_mode():
        kept = loaded.model(ids, use_cache=True).past_key_values
        taken = sum(it.keys.nbytes + it.values.nbytes for it in kept.layers)
        assert loaded.plan.kv_bytes_per_token == taken / ids.shape[1]


def test_the_chosen_kernels_answer_closely(made: Any) -> None:
    name, model, folder = made
    ids = torch.tensor(samples()[:1])
    with gptq.load(folder, device="cpu") as loaded, torch.inference_mode():
        assert "reference" not in loaded.plan.kernels()
        found, expected = loaded.model(ids).logits.float(), model(ids).logits
    # bfloat16 throughout, in models of random weights; in a mixture, rounding sends a token or two
    # to other experts
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(errors.median()) < 6e-2
    is_mixture = "moe" in name or name == "mixtral"
    assert relative(found, expected) < (2e-1 if is_mixture else 6e-2)


def test_it_generates_as_transformers_does(made: Any) -> None:
    _, _, folder = made
    options = gptq.GenerateOptions(max_new_tokens=6, temperature=0)
    with gptq.load(folder, backend="reference", device="cpu") as loaded:
        ids = loaded.tokenizer("The capital", return_tensors="pt")
        whole = loaded.model.generate(**ids, max_new_tokens=6, do_sample=False)
        reply = loaded.generate("The capital", options)
        new = whole[0, ids["input_ids"].shape[1] :]
        whole_text = loaded.tokenizer.decode(new, skip_special_tokens=True)
        assert reply.text == whole_text.rstrip("\ufffd")  # half characters at the end are dropped


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_is_written_with_the_names_of_its_year(name: str, tmp_path: Path) -> None:
    quantize(
        tiny_model(name),
        AutoTokenizer.from_pretrained(BASE),
        tmp_path,
        options=OPTIONS,
        samples=samples(),
    )
    layers = GPTQReader().open(tmp_path).layers
    expert = {
        "mixtral": "model.layers.0.block_sparse_moe.experts.3.w2",
        "qwen3_moe": "model.layers.0.mlp.experts.3.down_proj",
    }[name]
    assert expert in layers


def test_a_mixture_with_experts_left_unquantised_loads(tmp_path: Path) -> None:
    """GPTQModel's `dynamic` can leave any module as it is, one expert's projection too."""
    from safetensors.torch import load_file, save_file

    model = tiny_model("mixtral")
    quantize(
        model, AutoTokenizer.from_pretrained(BASE), tmp_path, options=OPTIONS, samples=samples()
    )
    checkpoint = GPTQReader().open(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for plain in ("block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.2.w2"):
        name = f"model.layers.1.{plain}"
        weight = checkpoint.packed(name).dequantize()
        tensors = {key: it for key, it in tensors.items() if not key.startswith(f"{name}.")}
        tensors[f"{name}.weight"] = weight
    save_file(tensors, tmp_path / "model.safetensors")
    ids = torch.tensor(samples()[:1])
    with gptq.load(tmp_path, backend="reference", device="cpu") as loaded, torch.inference_mode():
        assert loaded.plan.kernels() == {"reference": 30}
        assert relative(loaded.model(ids).logits, model(ids).logits) < 1e-5


def test_a_mixture_that_lacks_an_expert_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    quantize(
        tiny_model("mixtral"),
        AutoTokenizer.from_pretrained(BASE),
        tmp_path,
        options=OPTIONS,
        samples=samples(),
    )
    tensors = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.1.block_sparse_moe.experts.0.w1."
    kept = {key: it for key, it in tensors.items() if not key.startswith(gone)}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(gptq.TensorMismatch, match="expert"):
        gptq.load(tmp_path, device="cpu")


def test_code_of_a_model_is_never_run(tmp_path: Path) -> None:
    source = BASE.with_name("gptq-4bit-128g-act-sym")
    for file in source.iterdir():
        shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    with pytest.raises(gptq.UnsupportedFormat, match="own"):
        gptq.load(tmp_path, device="cpu")
    assert not Path("ran").exists()
