"""Tiny models of the families that people run, for the conformance of whole models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["FAMILIES", "make_config"]

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 256,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    "max_position_embeddings": 512, "tie_word_embeddings": False, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 32, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
STATES: dict[str, Any] = {
    "mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8,
    "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 16,
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
        "factor": 8.0, "short_factor": [1 + 0.05 * i for i in range(16)],
        "long_factor": [1 + 0.5 * i for i in range(16)], "short_mscale": 1.0, "long_mscale": 1.2,
    },
}  # fmt: skip
# What differs from the shape above, by a name for each; a name is its model type, or says it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-longrope": {"model_type": "llama", **LONGROPE},
    "llama-dynamic": {
        "model_type": "llama", "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    },
    "llama-yarn": {
        "model_type": "llama",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "mistral": {"sliding_window": 24},
    "qwen2": {},
    "qwen2-sliding": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16,
        "max_window_layers": 1,
    },
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {
        **EXPERTS, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "mixtral": EXPERTS,
    "gpt_oss": {**EXPERTS, "sliding_window": 16},
    "gemma2": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": None},
    "phi3-longrope": {"model_type": "phi3", "original_max_position_embeddings": 64, **LONGROPE},
    "phimoe-longrope": {
        "model_type": "phimoe", "original_max_position_embeddings": 64, **EXPERTS, **LONGROPE,
    },
    "deepseek_v2": {**EXPERTS, **LATENT},
    "deepseek_v3": {**EXPERTS, **LATENT},
    "glm4": {}, "glm4_moe": EXPERTS, "cohere2": {"sliding_window": 16}, "granite": {},
    "olmo2": {}, "smollm3": {}, "stablelm": {}, "starcoder2": {"sliding_window": 16},
    "bamba": {**STATES, "attn_layer_indices": [1]},
    "falcon_h1": STATES,
    "granitemoehybrid": {**STATES, **EXPERTS, "layer_types": ["mamba", "attention"]},
    "jamba": {**STATES, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8}, "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 8,
                                          "n_groups": 1, "chunk_size": 16},
    "falcon_mamba": {"state_size": 8},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16,
                        "block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 64},
    "xlstm": {"hidden_size": 128, "num_heads": 4, "num_blocks": 2},
    "minimax": {**EXPERTS, "layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "gpt2": {}, "gpt_neox": {}, "phi": {}, "gptj": {"rotary_dim": 16}, "opt": {"ffn_dim": 96,
                                                                    "word_embed_proj_dim": 64},
    "bloom": {}, "falcon": {"head_dim": None}, "mpt": {}, "openai-gpt": {"n_positions": 512},
}  # fmt: skip


def make_config(family: str) -> PreTrainedConfig:
    """Make the config of a family."""
    from transformers import AutoConfig

    fields = SHAPE | FAMILIES[family]
    if fields["head_dim"] is None:  # a class that computes it, and takes no other
        del fields["head_dim"]
    return AutoConfig.for_model(fields.pop("model_type", family), **fields)
