"""Repositories of 2023 and 2024 whose model type transformers does not know, in their own names.

Each checkpoint is written as its repository has it: config.json's keys, tensors' names, and what
it fuses. Its logits are compared with those of the transformers class that computes the same.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.architectures.families import FAMILIES
from gptq_loader_plugin.checkpoint.architectures.translate import translate
from gptq_loader_plugin.checkpoint.architectures.unsupported import REFUSED
from gptq_loader_plugin.checkpoint.reader import Checkpoint, GPTQReader
from gptq_loader_plugin.conformance.packer import write_qweight, write_qzeros
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.loading import load_model

BASE = Path(__file__).parents[1] / "data" / "checkpoints" / "base"
HIDDEN, INNER, HEADS, GROUPS, SIZE, LAYERS, VOCABULARY = 64, 96, 4, 2, 16, 2, 384
GROUP_ROWS = 32

COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 380, "eos_token_id": 381, "pad_token_id": 382}
LLAMA = {
    **COMMON, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
GROUPED = {**LLAMA, "num_key_value_heads": GROUPS}
FALCON = {
    **COMMON, "hidden_size": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "bias": False,
    "layer_norm_epsilon": 1e-5, "apply_residual_connection_post_layernorm": False,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "initializer_range": 0.02,
}  # fmt: skip
FALCON_SIZES = {
    **COMMON, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
}  # fmt: skip
PHI = {
    **COMMON, "n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 128,
    "n_inner": None, "n_head_kv": None, "rotary_dim": 8, "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False, "embd_pdrop": 0.0,
    "resid_pdrop": 0.0, "attn_pdrop": 0.0, "flash_attn": False, "fused_dense": False,
}  # fmt: skip
PHI_CLASS = transformers.PhiConfig(
    **COMMON, hidden_size=HIDDEN, intermediate_size=4 * HIDDEN, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, max_position_embeddings=128, partial_rotary_factor=0.5,
)  # fmt: skip
INTERNLM2_NAMES = (
    ("model.embed_tokens", "model.tok_embeddings"), ("lm_head", "output"),
    ("self_attn.o_proj", "attention.wo"), ("self_attn", "attention"),
    ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
    ("mlp.gate_proj", "feed_forward.w1"), ("mlp.up_proj", "feed_forward.w3"),
    ("mlp.down_proj", "feed_forward.w2"),
)  # fmt: skip
QWEN = {
    **COMMON, "hidden_size": HIDDEN, "intermediate_size": 2 * INNER, "kv_channels": SIZE,
    "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000, "rotary_pct": 1.0, "seq_length": 128, "no_bias": True,
    "max_position_embeddings": 512, "scale_attn_weights": True, "use_dynamic_ntk": True,
    "use_logn_attn": True, "tie_word_embeddings": False, "onnx_safe": None, "bf16": True,
}  # fmt: skip
QWEN_NAMES = (
    ("model.embed_tokens", "transformer.wte"), ("model.norm", "transformer.ln_f"),
    ("model.layers", "transformer.h"), ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"), ("self_attn.o_proj", "attn.c_proj"),
    ("self_attn", "attn"), ("mlp.up_proj", "mlp.w1"), ("mlp.gate_proj", "mlp.w2"),
    ("mlp.down_proj", "mlp.c_proj"),
)  # fmt: skip
CHATGLM = {
    "padded_vocab_size": VOCABULARY, "eos_token_id": 381, "pad_token_id": 382,
    "hidden_size": HIDDEN, "ffn_hidden_size": INNER, "kv_channels": SIZE, "num_layers": LAYERS,
    "num_attention_heads": HEADS, "seq_length": 128, "layernorm_epsilon": 1e-5, "rmsnorm": True,
    "multi_query_attention": True, "multi_query_group_num": GROUPS, "add_bias_linear": False,
    "add_qkv_bias": True, "apply_query_key_layer_scaling": True, "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False, "original_rope": True,
}  # fmt: skip
CHATGLM_NAMES = (
    ("model.embed_tokens", "transformer.embedding.word_embeddings"),
    ("model.norm", "transformer.encoder.final_layernorm"), ("model.", "transformer.encoder."),
    ("lm_head", "transformer.output_layer"), ("self_attn.o_proj", "self_attention.dense"),
    ("self_attn", "self_attention"), ("gate_up_proj", "dense_h_to_4h"),
    ("down_proj", "dense_4h_to_h"),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One repository.

    Attributes:
        stored: its config.json.
        same: the config of the transformers class that computes the same.
        names: transformers' names, and the repository's.
        fused: what it calls the layer of queries, keys and values, or "".
        grouped: whether that layer goes group by group.
    """

    stored: dict[str, Any]
    same: Any
    names: tuple[tuple[str, str], ...] = ()
    fused: str = ""
    grouped: bool = False


def llama(**fields: Any) -> Any:
    return transformers.LlamaConfig(**{**LLAMA, **fields})


def without(fields: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key}


CASES = {
    "Yi": Case(
        {**GROUPED, "model_type": "Yi", "rope_theta": 5000000.0},
        llama(num_key_value_heads=GROUPS, rope_theta=5000000.0),
        (("post_attention_layernorm", "ln2"), ("input_layernorm", "ln1")),
    ),
    "RefinedWeb": Case(
        {**FALCON, "model_type": "RefinedWeb", "n_head_kv": GROUPS, "alibi": False,
         "parallel_attn": True},
        transformers.FalconConfig(
            **FALCON_SIZES, num_kv_heads=GROUPS, new_decoder_architecture=True
        ),
    ),
    "RefinedWebModel": Case(
        {**FALCON, "model_type": "RefinedWebModel", "multi_query": True, "alibi": False,
         "parallel_attn": True},
        transformers.FalconConfig(**FALCON_SIZES, multi_query=True, parallel_attn=True),
    ),
    "RefinedWebModel with alibi": Case(
        {**FALCON, "model_type": "RefinedWebModel", "multi_query": False, "alibi": True,
         "parallel_attn": False, "bias": True},
        transformers.FalconConfig(
            **FALCON_SIZES, multi_query=False, alibi=True, parallel_attn=False, bias=True
        ),
    ),
    "aquila": Case({**GROUPED, "model_type": "aquila"}, llama(num_key_value_heads=GROUPS)),
    "xverse": Case({**LLAMA, "model_type": "xverse"}, llama()),
    "internlm": Case(
        {**LLAMA, "model_type": "internlm",
         "rotary": {"base": 20000, "type": "dynamic"}},
        llama(attention_bias=True, rope_theta=20000.0),
    ),
    "internlm2": Case(
        {**GROUPED, "model_type": "internlm2", "bias": False, "rope_theta": 1000000,
         "rope_scaling": {"type": "dynamic", "factor": 2.0}, "attn_implementation": "eager"},
        llama(num_key_value_heads=GROUPS, rope_theta=1000000.0),
        INTERNLM2_NAMES, fused="wqkv", grouped=True,
    ),
    "baichuan": Case(
        {**LLAMA, "model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"]},
        llama(), fused="W_pack",
    ),
    "baichuan 2": Case(
        {**LLAMA, "model_type": "baichuan", "vocab_size": 125696, "model_max_length": 128},
        llama(vocab_size=125696), fused="W_pack",
    ),
    "qwen": Case(
        {**QWEN, "model_type": "qwen"},
        transformers.Qwen2Config(**{**LLAMA, "rms_norm_eps": 1e-6}, num_key_value_heads=HEADS),
        QWEN_NAMES, fused="c_attn",
    ),
    "chatglm": Case(
        {**CHATGLM, "model_type": "chatglm", "rope_ratio": 500},
        transformers.GlmConfig(
            **GROUPED, head_dim=SIZE, attention_bias=True, rope_theta=5000000.0
        ),
        CHATGLM_NAMES, fused="query_key_value",
    ),
    "stablelm_epoch": Case(
        {**LLAMA, "model_type": "stablelm_epoch", "norm_eps": 1e-5, "rope_pct": 0.25,
         "rope_theta": 10000},
        transformers.StableLmConfig(
            **LLAMA, num_key_value_heads=HEADS, partial_rotary_factor=0.25
        ),
    ),
    "orion": Case(
        {**GROUPED, "model_type": "orion", "rms_norm_eps": 1e-4},
        transformers.StableLmConfig(
            **GROUPED, partial_rotary_factor=1.0, layer_norm_eps=1e-4
        ),
    ),
    "phi-msft": Case(
        {**PHI, "model_type": "phi-msft"}, PHI_CLASS,
        (("model.embed_tokens", "transformer.embd.wte"), ("model.layers", "transformer.h"),
         ("lm_head", "lm_head.linear"), ("model.final_layernorm", "lm_head.ln"),
         ("input_layernorm", "ln"), ("self_attn.dense", "mixer.out_proj"),
         ("self_attn", "mixer")),
        fused="Wqkv",
    ),
    "mixformer-sequential": Case(
        {**PHI, "model_type": "mixformer-sequential",
         "architecture": {"block_cls": "parallel", "mixer": {}, "mlp": {"mlp_cls": "mlp"}}},
        PHI_CLASS,
        (("model.embed_tokens", "layers.0.wte"), ("model.layers.1.", "layers.2."),
         ("model.layers.0.", "layers.1."), ("lm_head", "layers.3.linear"),
         ("model.final_layernorm", "layers.3.ln"), ("input_layernorm", "ln"),
         ("self_attn.dense", "mixer.out_proj"), ("self_attn", "mixer")),
        fused="Wqkv",
    ),
    "minicpm": Case(
        {**without(GROUPED, "tie_word_embeddings"), "model_type": "minicpm", "scale_emb": 12,
         "scale_depth": 1.4, "dim_model_base": 32},
        transformers.GraniteConfig(
            **{**GROUPED, "tie_word_embeddings": True}, embedding_multiplier=12,
            residual_multiplier=1.4 / 2**0.5, logits_scaling=2.0, attention_multiplier=0.25,
        ),
    ),
    "llama of SuperHOT": Case(
        {**LLAMA, "model_type": "llama", "max_position_embeddings": 8192,
         "auto_map": {"AutoModelForCausalLM": "modelling_llama.LlamaForCausalLM"}},
        llama(max_position_embeddings=8192,
              rope_scaling={"rope_type": "linear", "factor": 4.0}),
    ),
    "llava of 2023": Case({**LLAMA, "model_type": "llava", "mm_hidden_size": 8}, llama()),
    "llava": Case(
        {"model_type": "llava", "text_config": {**LLAMA, "model_type": "llama"},
         "vision_config": {"model_type": "clip_vision_model"}},
        llama(),
        (("lm_head", "language_model.lm_head"), ("model.", "language_model.model.")),
    ),
    "llava on mistral": Case(
        {"model_type": "llava", "text_config": {**GROUPED, "model_type": "mistral"}},
        transformers.MistralConfig(**GROUPED, sliding_window=None),
        (("lm_head", "language_model.lm_head"), ("model.", "language_model.model.")),
    ),
    "mistral3": Case(
        {"model_type": "mistral3",
         "text_config": {**GROUPED, "model_type": "mistral", "head_dim": SIZE}},
        transformers.MistralConfig(**GROUPED, head_dim=SIZE),
        (("lm_head", "language_model.lm_head"), ("model.", "language_model.model.")),
    ),
    "qwen2_vl": Case(
        {**GROUPED, "model_type": "qwen2_vl",
         "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 1000000.0},
        transformers.Qwen2Config(**GROUPED, rope_theta=1000000.0),
    ),
    "qwen2_5_vl": Case(
        {"model_type": "qwen2_5_vl", "tie_word_embeddings": False,
         "text_config": {
             **GROUPED, "model_type": "qwen2_5_vl_text",
             "rope_parameters": {
                 "rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 2000000.0,
             },
         }},
        transformers.Qwen2Config(**GROUPED, rope_theta=2000000.0),
        (("model.", "model.language_model."),),
    ),
}  # fmt: skip

GPT = {
    **COMMON, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": LAYERS, "n_head": HEADS,
    "n_positions": 128,
}  # fmt: skip
MULTI_LATENT = {
    **LLAMA, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 24, "v_head_dim": 16,
}  # fmt: skip


def known(config: Any, *names: tuple[str, str], **stored: Any) -> Case:
    """A repository that transformers has a class for by its own name."""
    return Case({**config.to_dict(), **stored}, config, names)


KNOWN = {
    "codegen": known(transformers.CodeGenConfig(**GPT, rotary_dim=8)),
    "cohere": known(transformers.CohereConfig(**GROUPED)),
    "cohere2": known(transformers.Cohere2Config(**GROUPED)),
    "exaone": Case(
        {
            **COMMON, "model_type": "exaone", "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
            "max_position_embeddings": 128, "layer_norm_epsilon": 1e-4, "head_dim": SIZE,
            "activation_function": "silu", "rope_theta": 1000000, "tie_word_embeddings": False,
            "auto_map": {"AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM"},
        },
        llama(num_key_value_heads=GROUPS, rms_norm_eps=1e-4, rope_theta=1000000.0),
        (
            ("model.embed_tokens", "transformer.wte"), ("model.norm", "transformer.ln_f"),
            ("model.layers", "transformer.h"), ("input_layernorm", "ln_1"),
            ("post_attention_layernorm", "ln_2"), ("self_attn.o_proj", "attn.attention.out_proj"),
            ("self_attn", "attn.attention"), ("mlp.gate_proj", "mlp.c_fc_0"),
            ("mlp.up_proj", "mlp.c_fc_1"), ("mlp.down_proj", "mlp.c_proj"),
        ),
    ),
    "gemma3_text": known(transformers.Gemma3TextConfig(**GROUPED, head_dim=SIZE)),
    "glm4": known(transformers.Glm4Config(**GROUPED, head_dim=SIZE)),
    "gpt_bigcode": known(transformers.GPTBigCodeConfig(**GPT, multi_query=True)),
    "gpt_neo": known(
        transformers.GPTNeoConfig(
            **COMMON, hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS,
            max_position_embeddings=128, attention_types=[[["global", "local"], 1]],
        )
    ),
    "gptj": known(transformers.GPTJConfig(**GPT, rotary_dim=8)),
    "granite": known(transformers.GraniteConfig(**GROUPED, embedding_multiplier=12)),
    "minicpm3": known(transformers.AutoConfig.for_model("minicpm3", **MULTI_LATENT)),
    "mpt": known(
        transformers.MptConfig(
            d_model=HIDDEN, n_heads=HEADS, n_layers=LAYERS, max_seq_len=128,
            vocab_size=VOCABULARY,
        ),
        auto_map={"AutoModelForCausalLM": "modeling_mpt.MPTForCausalLM"},
        attn_config={
            "alibi": True, "alibi_bias_max": 8, "attn_impl": "triton", "attn_pdrop": 0,
            "attn_type": "multihead_attention", "attn_uses_sequence_id": False,
            "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
        },
        norm_type="low_precision_layernorm", no_bias=True, expansion_ratio=4,
    ),
    "olmo": known(transformers.OlmoConfig(**GROUPED)),
    "olmo2": known(transformers.Olmo2Config(**GROUPED)),
    "smollm3": known(transformers.SmolLM3Config(**GROUPED)),
    "stablelm": known(transformers.StableLmConfig(**GROUPED)),
}  # fmt: skip


@dataclass
class Packed:
    """One layer as GPTQ has it: codes [K, N], zeros and scales [G, N], g_idx [K], bias."""

    codes: np.ndarray[Any, Any]
    zeros: np.ndarray[Any, Any]
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None
    bits: int

    def weight(self) -> torch.Tensor:
        group = self.g_idx.long()
        shifted = torch.from_numpy(self.codes).float() - torch.from_numpy(self.zeros).float()[group]
        return (shifted * self.scales.float()[group]).t().contiguous()

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        packed = {
            f"{name}.qweight": torch.from_numpy(write_qweight(self.codes, self.bits, "continuous")),
            f"{name}.qzeros": torch.from_numpy(
                write_qzeros(self.zeros, self.bits, "continuous", "v1")
            ),
            f"{name}.scales": self.scales.contiguous(),
            f"{name}.g_idx": self.g_idx.clone(),
        }
        return packed if self.bias is None else {**packed, f"{name}.bias": self.bias.half()}


def quantised(
    module: torch.nn.Linear, generator: np.random.Generator, order: Any, bits: int
) -> Packed:
    """Random codes, zeros and scales for a linear, with groups in that order."""
    middle = 1 << (bits - 1)
    rows, columns = module.in_features, module.out_features
    groups = rows // GROUP_ROWS
    return Packed(
        generator.integers(0, 2 * middle, (rows, columns), dtype=np.uint8),
        generator.integers(middle // 2, middle + middle // 2, (groups, columns), dtype=np.uint8),
        torch.from_numpy(generator.uniform(0.005, 0.02, (groups, columns))).half(),
        torch.from_numpy(order % groups).int(),
        None if module.bias is None else module.bias.data,
        bits,
    )


def side_by_side(parts: list[Packed], *, grouped: bool) -> Packed:
    """Join queries, keys and values as the repositories' own code does."""
    heads = [it.codes.shape[1] // SIZE for it in parts]
    order = [(part, head) for part, count in enumerate(heads) for head in range(count)]
    if grouped:
        order = []
        for group in range(heads[1]):
            share = heads[0] // heads[1]
            order += [(0, group * share + it) for it in range(share)]
            order += [(1, group), (2, group)]

    def join(of: list[Any], concatenate: Any) -> Any:
        return concatenate([of[p][..., h * SIZE : (h + 1) * SIZE] for p, h in order], -1)

    biases = [it.bias for it in parts]
    return Packed(
        join([it.codes for it in parts], np.concatenate),
        join([it.zeros for it in parts], np.concatenate),
        join([it.scales for it in parts], torch.cat),
        parts[0].g_idx,
        None if biases[0] is None else join(biases, torch.cat),
        parts[0].bits,
    )


def publish(case: Case, folder: Path, *, bits: int = 4) -> Any:
    """Write a checkpoint as its repository has it; give the model that answers the same."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    model = AutoModelForCausalLM.from_config(case.same).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = torch.randn_like(parameter) * 0.1 + (not name.endswith("bias"))
        parameter.data = parameter.data.half().float()
    linears = {
        name: it
        for name, it in model.named_modules()
        if isinstance(it, torch.nn.Linear) and it is not model.get_output_embeddings()
    }
    packed: dict[str, Packed] = {}
    orders = {it.in_features: generator.permutation(it.in_features) for it in linears.values()}
    for name, linear in linears.items():
        packed[name] = quantised(linear, generator, orders[linear.in_features], bits)
        linear.weight.data = packed[name].weight()
    tensors = {
        name: it.half()
        for name, it in model.state_dict().items()
        if name.rpartition(".")[0] not in packed
    }
    tied = model.config.tie_word_embeddings
    tensors = {name: it for name, it in tensors.items() if not tied or name != "lm_head.weight"}
    if case.fused:
        for name in [it for it in packed if it.endswith(".q_proj")]:
            parts = [
                packed.pop(name.replace("q_proj", it)) for it in ("q_proj", "k_proj", "v_proj")
            ]
            joined = side_by_side(parts, grouped=case.grouped)
            packed[name.replace("q_proj", case.fused)] = joined
    for name, layer in packed.items():
        tensors |= layer.tensors(name)
    save_file(
        {own_name(case, it): value for it, value in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(case.stored))
    (folder / "quantize_config.json").write_text(json.dumps({
        "bits": bits, "group_size": GROUP_ROWS, "checkpoint_format": "gptq", "desc_act": True,
        "sym": False, "damp_percent": 0.1, "model_file_base_name": "model",
    }))  # fmt: skip
    for file in BASE.glob("*token*"):
        shutil.copy(file, folder)
    return model


def own_name(case: Case, name: str) -> str:
    """Write a tensor's name as the repository does; an end in a dot says the beginning of names."""
    for ours, theirs in case.names:
        end = ours.endswith(".")
        pattern = rf"^{re.escape(ours)}" if end else rf"(?<!\w){re.escape(ours)}(?!\w)"
        name = re.sub(pattern, theirs, name, count=1)
    return name


IDS = torch.randint(0, 380, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(CASES | KNOWN))
def test_it_answers_as_the_class_that_computes_the_same(name: str, tmp_path: Path) -> None:
    model = publish((CASES | KNOWN)[name], tmp_path)
    if name == "baichuan 2":  # its head's rows have length one
        head = model.lm_head.weight
        head.data = head.data / head.data.norm(dim=1, keepdim=True)
    loaded = load_model(tmp_path, LoadOptions(backend="reference", device="cpu"))
    with torch.inference_mode():
        found, expected = loaded.model(IDS).logits, model(IDS).logits
    assert type(loaded.model) is type(model)
    assert not loaded.warnings
    noted = [it for it in loaded.notes if "its own code" in it]
    assert len(noted) == (name in CASES)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float(expected.norm()) > 0.5  # a model that answers nothing agrees with anything


def error_of(folder: Path, model: Any) -> float:
    loaded = load_model(folder, LoadOptions(backend="reference", device="cpu"))
    with torch.inference_mode():
        found, expected = loaded.model(IDS).logits, model(IDS).logits
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_zeros_of_every_width_are_cut(bits: int, tmp_path: Path) -> None:
    assert error_of(tmp_path, publish(CASES["qwen"], tmp_path, bits=bits)) < 1e-5


def test_zeros_that_share_a_word_are_refused(tmp_path: Path) -> None:
    """32 zeros of 3 bits lie in three words; a head here has 16."""
    publish(CASES["internlm2"], tmp_path, bits=3)
    with pytest.raises(gptq.UnsupportedFormat, match="share words"):
        gptq.explain(tmp_path, device="cpu")


def test_a_pickle_is_cut_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = publish(CASES["internlm2"], tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "model.pt")
    (tmp_path / "model.safetensors").unlink()
    assert error_of(tmp_path, model) < 1e-5


@pytest.mark.parametrize("name", ["Yi", "internlm2", "llama of SuperHOT", "qwen"])
def test_transformers_loads_and_saves_it(name: str, tmp_path: Path) -> None:
    from gptq_loader_extensions import transformers as host

    model = publish(CASES[name], tmp_path)
    plugins = gptq.Plugins(host)
    gptq.enable_transformers(plugins=plugins)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, trust_remote_code=True
        )
        loaded.save_pretrained(tmp_path / "saved")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    finally:
        gptq.disable_transformers(plugins=plugins)
    with torch.inference_mode():
        expected = model(IDS).logits
        for found in (loaded(IDS).logits, again(IDS).logits):
            assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_the_plan_has_the_layers_that_are_run(tmp_path: Path) -> None:
    """A fused layer is planned, and shown, as the three it is cut into."""
    publish(CASES["internlm2"], tmp_path)
    plan = gptq.explain(tmp_path, device="cpu")
    shapes = {it.layer.name: it.layer.out_features for it in plan.choices}
    assert len(shapes) == 7 * LAYERS
    assert shapes["model.layers.1.self_attn.q_proj"] == HEADS * SIZE
    assert shapes["model.layers.1.self_attn.v_proj"] == GROUPS * SIZE
    assert plan.kv_bytes_per_token is not None
    report = gptq.inspect(tmp_path)
    assert (report.model_type, report.quantized_layers) == ("internlm2", 5 * LAYERS)


def test_the_chosen_kernels_answer_closely_and_on_several_devices(tmp_path: Path) -> None:
    model = publish(CASES["qwen"], tmp_path)
    options = {"device_map": "auto", "max_memory": {"cpu": "125kB", "disk": ""}}
    with torch.inference_mode():
        expected = model(IDS).logits
        with gptq.load(tmp_path, device="cpu") as loaded:
            assert "reference" not in loaded.plan.kernels()
            found = loaded.model(IDS).logits.float()
        assert float((found - expected).norm() / expected.norm()) < 6e-2
        with gptq.load(tmp_path, offload_folder=tmp_path / "disk", **options) as loaded:
            assert {it.name for it in loaded.plan.placed.values()} == {"cpu", "disk"}
            found = loaded.model(IDS).logits.float()
        assert float((found - expected).norm() / expected.norm()) < 6e-2


def test_a_context_ends_where_the_mathematics_would_differ(tmp_path: Path) -> None:
    """Qwen stretches its positions past `seq_length`, which transformers' class does not."""
    publish(CASES["qwen"], tmp_path)
    with gptq.load(tmp_path, backend="reference", device="cpu") as loaded:
        assert loaded.context == 128


def test_other_parts_of_a_model_are_named_in_one_warning(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    publish(CASES["llava"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tower = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    save_file({**tensors, tower: torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    with gptq.load(tmp_path, backend="reference", device="cpu") as loaded:
        assert len(loaded.warnings) == 1
        assert "vision_tower" in loaded.warnings[0]


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({key: it for key, it in {**config, **fields}.items() if it != ...}))


DIFFERENT = {
    "baichuan without its limit": ("baichuan", {"max_position_embeddings": ...}, "ALiBi"),
    "baichuan of 13B": ("baichuan", {"hidden_size": 5120}, "ALiBi"),
    "chatglm 1": ("chatglm", {"multi_query_attention": ...}, "first generation"),
    "chatglm, rotated otherwise": ("chatglm", {"original_rope": False}, "original_rope is false"),
    "llava on qwen": ("llava", {"text_config": {"model_type": "qwen2"}}, "not Llama or Mistral"),
    "mistral3 on another": ("mistral3", {"text_config": {"model_type": "x"}}, "not Mistral"),
    "minicpm of experts": ("minicpm", {"num_experts": 8}, "mixture of experts"),
    "orion with biases": ("orion", {"attention_bias": True}, "attention_bias is true"),
    "qwen, partly rotated": ("qwen", {"rotary_pct": 0.5}, "rotary_pct is 0.5"),
    "santacoder": (
        "xverse", {"model_type": "gpt2", "attention_head_type": "multiquery"}, "SantaCoder",
    ),
    **{
        f"mpt with {key}": ("xverse", {"model_type": "mpt", "attn_config": {key: value}}, "lacks")
        for key, value in (("alibi", False), ("qk_ln", True), ("attn_type", "multiquery_attention"))
    },
    **{it.model_type: ("xverse", {"model_type": it.model_type}, it.reason)
       for it in REFUSED if "Python code" in it.reason},
}  # fmt: skip


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose config.json a test writes."""
    folder = tmp_path_factory.mktemp("one")
    publish(CASES["xverse"], folder)
    return folder


@pytest.mark.parametrize("name", sorted(DIFFERENT))
def test_what_no_class_computes_is_refused_in_words(name: str, one_folder: Path) -> None:
    case, fields, words = DIFFERENT[name]
    (one_folder / "config.json").write_text(json.dumps(CASES[case].stored))
    edit_config(one_folder, **fields)
    for attempt in (gptq.load, gptq.explain):
        with pytest.raises(gptq.UnsupportedFormat, match=re.escape(words)) as refused:
            attempt(one_folder, device="cpu")
        assert "GGUF" in refused.value.hint
    assert gptq.inspect(one_folder).quantized_layers  # what is in it is told all the same


def test_a_config_that_lacks_what_it_takes_is_told_of(tmp_path: Path) -> None:
    publish(CASES["qwen"], tmp_path)
    edit_config(tmp_path, seq_length=...)
    with pytest.raises(gptq.ConfigInvalid, match="seq_length"):
        gptq.load(tmp_path, device="cpu")
    edit_config(tmp_path, model_type="mistral3")
    with pytest.raises(gptq.ConfigInvalid, match="text_config"):
        gptq.load(tmp_path, device="cpu")


def test_heads_that_the_fused_layer_does_not_hold_are_told_of(tmp_path: Path) -> None:
    publish(CASES["internlm2"], tmp_path)
    edit_config(tmp_path, num_key_value_heads=4)
    with pytest.raises(gptq.ConfigInvalid, match=r"wqkv.* not the heads that config\.json names"):
        gptq.load(tmp_path, device="cpu")


def test_computed_buffers_are_not_taken_from_a_file(tmp_path: Path) -> None:
    """Repositories of Qwen and ChatGLM have the rotation's frequencies, in half precision."""
    from safetensors.torch import load_file

    for name, buffer in (("qwen", "rotary_emb.inv_freq"), ("chatglm", "rotary_pos_emb.inv_freq")):
        model = publish(CASES[name], tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[f"transformer.{buffer}"] = torch.ones(SIZE // (2 if name == "qwen" else 4)).half()
        save_file(tensors, tmp_path / "model.safetensors")
        assert error_of(tmp_path, model) < 1e-5


def test_a_plugins_reader_may_know_another_family(tmp_path: Path) -> None:
    case = CASES["Yi"]
    model = publish(case, tmp_path)
    edit_config(tmp_path, model_type="mine")
    mine = replace(next(it for it in FAMILIES if it.model_type == "Yi"), model_type="mine")

    class MyReader:
        name = "mine"

        def open(self, path: Path) -> Checkpoint | None:
            return translate(GPTQReader().open(path), families=(mine,))

    class Plugin:
        @gptq.hookimpl
        def gptq_readers(self) -> list[MyReader]:
            return [MyReader()]

    plugins = gptq.Plugins(Plugin(), installed=True)
    loaded = load_model(tmp_path, LoadOptions(backend="reference", device="cpu"), plugins=plugins)
    with torch.inference_mode():
        found, expected = loaded.model(IDS).logits, model(IDS).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_transformers_is_left_what_is_not_quantised(tmp_path: Path) -> None:
    """A Qwen in float16 is transformers' own affair, with its own code or without."""
    from gptq_loader_extensions.transformers.detect import find_checkpoint

    publish(CASES["qwen"], tmp_path)
    edit_config(tmp_path, seq_length=...)
    with pytest.raises(gptq.ConfigInvalid, match="seq_length"):
        find_checkpoint(tmp_path, {})
    (tmp_path / "quantize_config.json").unlink()
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert find_checkpoint(tmp_path, {}) is None


def test_a_quantised_head_that_must_be_normalised_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    publish(CASES["baichuan 2"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(gptq.UnsupportedFormat, match=r"lm_head\.weight"):
        gptq.explain(tmp_path, device="cpu")


def test_code_that_is_passed_over_is_told_of(tmp_path: Path) -> None:
    publish(CASES["xverse"], tmp_path)
    edit_config(tmp_path, model_type="llama", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (tmp_path / "modeling_own.py").write_text("raise SystemExit\n")
    with gptq.load(tmp_path, backend="reference", device="cpu") as loaded:
        assert len(loaded.warnings) == 1
        assert "modeling_own.Own" in loaded.warnings[0]


def test_every_family_has_a_case() -> None:
    assert {it.model_type for it in FAMILIES} == {it.stored["model_type"] for it in CASES.values()}


def test_a_config_with_a_field_of_the_wrong_type_is_told_of(tmp_path: Path) -> None:
    publish(CASES["xverse"], tmp_path)
    for model_type in ("llama", "xverse"):
        edit_config(tmp_path, model_type=model_type, vocab_size="384")
        with pytest.raises(gptq.UnsupportedFormat, match="vocab_size"):
            gptq.load(tmp_path, device="cpu")


def test_a_model_that_goes_on_with_no_text_is_refused_in_words(tmp_path: Path) -> None:
    publish(CASES["xverse"], tmp_path)
    for model_type, words in (("t5", "goes on with a text"), ("llamo", "has no llamo models")):
        edit_config(tmp_path, model_type=model_type)
        with pytest.raises(gptq.UnsupportedFormat, match=words):
            gptq.load(tmp_path, device="cpu")


def test_the_page_names_every_kind() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text("utf-8")
    rows = [row.split("|")[2] for row in page.splitlines() if row.startswith("| ")]
    named = {it.strip() for row in rows for it in row.replace("`", "").split(",")}
    assert {it.model_type for it in (*FAMILIES, *REFUSED)} - {"llama"} <= named
