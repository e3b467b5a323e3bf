"""Repositories whose model type transformers does not know, or knows by a class of its own.

For each: its config.json, the config of the transformers class that computes the same, and what
the repository calls the tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

HIDDEN, INNER, HEADS, GROUPS, SIZE, LAYERS, VOCABULARY = 64, 96, 4, 2, 16, 2, 384

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
class Repository:
    """One repository.

    Attributes:
        stored: its config.json.
        equivalent: the config of the transformers class that computes the same.
        names: transformers' names, and the repository's.
        fused: what it calls the layer of queries, keys and values, or "".
        grouped: whether that layer goes group by group.
    """

    stored: dict[str, Any]
    equivalent: Any
    names: tuple[tuple[str, str], ...] = ()
    fused: str = ""
    grouped: bool = False


def llama(**fields: Any) -> Any:
    return transformers.LlamaConfig(**{**LLAMA, **fields})


def without(fields: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key}


REPOSITORIES = {
    "Yi": Repository(
        {**GROUPED, "model_type": "Yi", "rope_theta": 5000000.0},
        llama(num_key_value_heads=GROUPS, rope_theta=5000000.0),
        (("post_attention_layernorm", "ln2"), ("input_layernorm", "ln1")),
    ),
    "RefinedWeb": Repository(
        {**FALCON, "model_type": "RefinedWeb", "n_head_kv": GROUPS, "alibi": False,
         "parallel_attn": True},
        transformers.FalconConfig(
            **FALCON_SIZES, num_kv_heads=GROUPS, new_decoder_architecture=True
        ),
    ),
    "RefinedWebModel": Repository(
        {**FALCON, "model_type": "RefinedWebModel", "multi_query": True, "alibi": False,
         "parallel_attn": True},
        transformers.FalconConfig(**FALCON_SIZES, multi_query=True, parallel_attn=True),
    ),
    "RefinedWebModel with alibi": Repository(
        {**FALCON, "model_type": "RefinedWebModel", "multi_query": False, "alibi": True,
         "parallel_attn": False, "bias": True},
        transformers.FalconConfig(
            **FALCON_SIZES, multi_query=False, alibi=True, parallel_attn=False, bias=True
        ),
    ),
    "aquila": Repository({**GROUPED, "model_type": "aquila"}, llama(num_key_value_heads=GROUPS)),
    "xverse": Repository({**LLAMA, "model_type": "xverse"}, llama()),
    "internlm": Repository(
        {**LLAMA, "model_type": "internlm",
         "rotary": {"base": 20000, "type": "dynamic"}},
        llama(attention_bias=True, rope_theta=20000.0),
    ),
    "internlm2": Repository(
        {**GROUPED, "model_type": "internlm2", "bias": False, "rope_theta": 1000000,
         "rope_scaling": {"type": "dynamic", "factor": 2.0}, "attn_implementation": "eager"},
        llama(num_key_value_heads=GROUPS, rope_theta=1000000.0),
        INTERNLM2_NAMES, fused="wqkv", grouped=True,
    ),
    "baichuan": Repository(
        {**LLAMA, "model_type": "baichuan", "architectures": ["BaiChuanForCausalLM"]},
        llama(), fused="W_pack",
    ),
    "baichuan 2": Repository(
        {**LLAMA, "model_type": "baichuan", "vocab_size": 125696, "model_max_length": 128},
        llama(vocab_size=125696), fused="W_pack",
    ),
    "qwen": Repository(
        {**QWEN, "model_type": "qwen"},
        transformers.Qwen2Config(**{**LLAMA, "rms_norm_eps": 1e-6}, num_key_value_heads=HEADS),
        QWEN_NAMES, fused="c_attn",
    ),
    "chatglm": Repository(
        {**CHATGLM, "model_type": "chatglm", "rope_ratio": 500},
        transformers.GlmConfig(
            **GROUPED, head_dim=SIZE, attention_bias=True, rope_theta=5000000.0
        ),
        CHATGLM_NAMES, fused="query_key_value",
    ),
    "stablelm_epoch": Repository(
        {**LLAMA, "model_type": "stablelm_epoch", "norm_eps": 1e-5, "rope_pct": 0.25,
         "rope_theta": 10000},
        transformers.StableLmConfig(
            **LLAMA, num_key_value_heads=HEADS, partial_rotary_factor=0.25
        ),
    ),
    "orion": Repository(
        {**GROUPED, "model_type": "orion", "rms_norm_eps": 1e-4},
        transformers.StableLmConfig(
            **GROUPED, partial_rotary_factor=1.0, layer_norm_eps=1e-4
        ),
    ),
    "phi-msft": Repository(
        {**PHI, "model_type": "phi-msft"}, PHI_CLASS,
        (("model.embed_tokens", "transformer.embd.wte"), ("model.layers", "transformer.h"),
         ("lm_head", "lm_head.linear"), ("model.final_layernorm", "lm_head.ln"),
         ("input_layernorm", "ln"), ("self_attn.dense", "mixer.out_proj"),
         ("self_attn", "mixer")),
        fused="Wqkv",
    ),
    "mixformer-sequential": Repository(
        {**PHI, "model_type": "mixformer-sequential",
         "architecture": {"block_cls": "parallel", "mixer": {}, "mlp": {"mlp_cls": "mlp"}}},
        PHI_CLASS,
        (("model.embed_tokens", "layers.0.wte"), ("model.layers.1.", "layers.2."),
         ("model.layers.0.", "layers.1."), ("lm_head", "layers.3.linear"),
         ("model.final_layernorm", "layers.3.ln"), ("input_layernorm", "ln"),
         ("self_attn.dense", "mixer.out_proj"), ("self_attn", "mixer")),
        fused="Wqkv",
    ),
    "minicpm": Repository(
        {**without(GROUPED, "tie_word_embeddings"), "model_type": "minicpm", "scale_emb": 12,
         "scale_depth": 1.4, "dim_model_base": 32},
        transformers.GraniteConfig(
            **{**GROUPED, "tie_word_embeddings": True}, embedding_multiplier=12,
            residual_multiplier=1.4 / 2**0.5, logits_scaling=2.0, attention_multiplier=0.25,
        ),
    ),
    "llama of SuperHOT": Repository(
        {**LLAMA, "model_type": "llama", "max_position_embeddings": 8192,
         "auto_map": {"AutoModelForCausalLM": "modelling_llama.LlamaForCausalLM"}},
        llama(max_position_embeddings=8192,
              rope_scaling={"rope_type": "linear", "factor": 4.0}),
    ),
    "llava of 2023": Repository({**LLAMA, "model_type": "llava", "mm_hidden_size": 8}, llama()),
    "llava": Repository(
        {"model_type": "llava", "text_config": {**LLAMA, "model_type": "llama"},
         "vision_config": {"model_type": "clip_vision_model"}},
        llama(),
        (("lm_head", "language_model.lm_head"), ("model.", "language_model.model.")),
    ),
    "llava on mistral": Repository(
        {"model_type": "llava", "text_config": {**GROUPED, "model_type": "mistral"}},
        transformers.MistralConfig(**GROUPED, sliding_window=None),
        (("lm_head", "language_model.lm_head"), ("model.", "language_model.model.")),
    ),
    "mistral3": Repository(
        {"model_type": "mistral3",
         "text_config": {**GROUPED, "model_type": "mistral", "head_dim": SIZE}},
        transformers.MistralConfig(**GROUPED, head_dim=SIZE),
        (("lm_head", "language_model.lm_head"), ("model.", "language_model.model.")),
    ),
    "qwen2_vl": Repository(
        {**GROUPED, "model_type": "qwen2_vl",
         "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}, "rope_theta": 1000000.0},
        transformers.Qwen2Config(**GROUPED, rope_theta=1000000.0),
    ),
    "qwen2_5_vl": Repository(
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


def known(config: Any, *names: tuple[str, str], **stored: Any) -> Repository:
    """A repository that transformers has a class for by its own name."""
    return Repository({**config.to_dict(), **stored}, config, names)


KNOWN = {
    "codegen": known(transformers.CodeGenConfig(**GPT, rotary_dim=8)),
    "cohere": known(transformers.CohereConfig(**GROUPED)),
    "cohere2": known(transformers.Cohere2Config(**GROUPED)),
    "exaone": Repository(
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
