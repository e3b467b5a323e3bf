"""Make a tiny config of any model type that transformers has, by its own config class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CAUSAL = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WITH_PICTURES = tuple(
    name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if name not in CAUSAL
)
VOCABULARY, HIDDEN, HEAD, HEADS, LAYERS, EXPERTS = 384, 128, 32, 4, 2, 4

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "padded_vocab_size": VOCABULARY,
    "hidden_size": HIDDEN, "n_embd": HIDDEN, "d_model": HIDDEN, "dim": HIDDEN, "n_embed": HIDDEN,
    "word_embed_proj_dim": HIDDEN, "embedding_size": HIDDEN, "emb_dim": HIDDEN,
    "dim_model": HIDDEN, "output_hidden_size": HIDDEN, "output_dim": HIDDEN,
    "intermediate_size": 192, "n_inner": 192, "ffn_dim": 192, "dim_ff": 192,
    "decoder_ffn_dim": 192, "encoder_ffn_dim": 192, "ffn_hidden_size": 192, "d_ff": 192,
    "d_inner": 192, "ffn_dim_multiplier": None, "block_multiple_of": 32,
    "intermediate_size_mlp": 192, "shared_intermediate_size": 64, "dense_intermediate_size": 192,
    "moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
    "shared_expert_intermediate_size": 64, "expert_ffn_hidden_size": 64,
    "moe_shared_intermediate_size": 64, "expert_hidden_size": 64,
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "n_layers": LAYERS, "num_layers": LAYERS,
    "decoder_layers": LAYERS, "encoder_layers": LAYERS, "num_blocks": LAYERS,
    "num_attention_heads": HEADS, "n_head": HEADS, "n_heads": HEADS, "num_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_attention_heads": HEADS,
    "num_key_value_heads": 2, "num_kv_heads": 2, "n_kv_heads": 2, "num_global_key_value_heads": 2,
    "swa_num_attention_heads": HEADS, "swa_num_key_value_heads": 2,
    "head_dim": HEAD, "attention_head_dim": HEAD, "kv_channels": HEAD, "global_head_dim": HEAD,
    "swa_head_dim": HEAD, "swa_v_head_dim": HEAD, "dim_head": HEAD, "attention_head_size": HEAD,
    "rotary_dim": 16, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 64,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "qk_head_dim": 64, "o_lora_rank": 64, "o_groups": 2,
    "n_routed_experts": EXPERTS, "num_experts": EXPERTS, "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS, "moe_num_primary_experts": EXPERTS, "num_routed_experts": EXPERTS,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_top_k": 2, "moe_topk": 2,
    "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1,
    "num_dense_layers": 1, "moe_layer_start_index": 0, "moe_layer_end_index": LAYERS - 1,
    "mlp_only_layers": [], "decoder_sparse_step": 1,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256,
    "seq_length": 256, "max_source_positions": 256, "max_target_positions": 256,
    "sliding_window": 8, "attention_window_size": 8, "local_attention": 8,
    "attention_chunk_size": 16, "window_size": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "mamba_n_heads": 8, "mamba_num_heads": 8, "mamba_d_head": 32,
    "mamba_head_dim": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "n_mamba_heads": 2,
    "mamba_d_ssm": 256, "mamba_expand": 2, "mamba_chunk_size": 16, "chunk_size": 16,
    "ssm_state_size": 16, "state_size": 16, "mamba_dt_rank": 8, "time_step_rank": 8,
    "lru_width": HIDDEN, "conv_L_cache": 3, "n_groups": 1, "expand": 2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1,
    "type_vocab_size": 2, "num_nextn_predict_layers": 0, "num_mtp_layers": 0,
    "image_token_id": 370, "image_token_index": 370, "video_token_id": 371,
    "video_token_index": 371, "audio_token_id": 372, "vision_start_token_id": 373,
    "vision_end_token_id": 374, "boi_token_id": 375, "eoi_token_id": 376, "boa_token_id": 377,
    "eoa_token_id": 378, "image_start_token_id": 373, "image_end_token_id": 374,
    "audio_start_token_id": 377, "audio_end_token_id": 378, "image_pad_token_id": 370,
    "text_embed_dim": HIDDEN, "out_hidden_size": HIDDEN, "projection_dim": HIDDEN,
    "depth": 1, "vision_feature_layer": -1,
}  # fmt: skip
VISION = SIZES | {
    "num_hidden_layers": 1, "num_layers": 1, "depth": 1, "encoder_layers": 1, "patch_size": 14,
    "image_size": 28, "hidden_size": 64, "embed_dim": 64, "num_heads": 2,
    "num_attention_heads": 2, "attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [0], "intermediate_size": 64,
}  # fmt: skip
# What a family needs beyond these, by its model type; "text.x" is of its text_config.
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
TABLE: dict[str, dict[str, Any]] = {
    **{name: {"text_config.rope_parameters": MROPE}
       for name in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker")},
    "paddleocr_vl": {"text_config.rope_parameters": MROPE, "rope_parameters": MROPE},
    **{name: {"text_config.rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}
       for name in ("glm4v", "glm46v", "glm_ocr", "glmga", "glm4v_moe")},
    "qwen4_exp_text": {"indexer_n_heads": None},
    "ernie4_5_vl_moe": {"text_config.moe_intermediate_size": [64, 64]},
    "glm5_next": {"text_config.num_key_value_heads": HEADS},
    "dots3_note": {"text_config.num_key_value_heads": HEADS},
    "inkling2": {"vision_config.text_hidden_size": HIDDEN},
    "inkling2_loop": {"vision_config.text_hidden_size": HIDDEN},
    "bailing_hybrid": {"linear_head_dim": HEAD},
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 370}},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config.rope_theta": 10_000.0, "attn_config.kv_n_heads": 2,
        "attn_config.clip_qkv": 8.0, "ffn_config.hidden_size": HIDDEN,
    },
    "dory": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 0},
    "gemma4_assistant": {"text_config.hidden_size_per_layer_input": 0},
    "gemma4": {"text_config.vocab_size_per_layer_input": VOCABULARY,
               "text_config.hidden_size_per_layer_input": 32, "audio_config": None},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent",
                                                                 "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [64, 64], "axial_pos_shape": [16, 16],
                 "num_buckets": 4},
    "roc_bert": {"pronunciation_vocab_size": 400, "shape_vocab_size": 400},
    "deepseek_v4": {"swiglu_limit": 0.05},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
               "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3]},
    "zamba": {"num_hidden_layers": 6,
              "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


ANY_CONFIG = ("AutoConfig", "PreTrainedConfig")
TEXT = ("text_config", "decoder", "llm_config", "language_config", "thinker_config")


def tiny_config(model_type: str) -> PreTrainedConfig:
    """Make a config of two to four layers, one of each kind that the model type has."""
    return _tiny(CONFIG_MAPPING[model_type], TABLE.get(model_type, {}), SIZES)


def _tiny(kind: Any, own: dict[str, Any], sizes: dict[str, Any]) -> Any:
    default = kind()
    known = default.to_dict()
    fields: dict[str, Any] = {key: value for key, value in sizes.items() if key in known}
    fields["use_cache"] = True
    if "is_decoder" in known:
        fields["is_decoder"] = True
    for name in known:
        if name.endswith("_token_id") and isinstance(known[name], int) and name not in sizes:
            fields[name] = 379
    fields |= _one_layer_of_each_kind(known, own.get("num_hidden_layers", LAYERS), fields)
    fields |= _parts(kind, default, own)
    if known.get("kv_lora_rank") and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = HEADS
    fields |= _rotations(known)
    fields |= {key: value for key, value in own.items() if "." not in key}
    return kind(**fields)


def _one_layer_of_each_kind(
    known: dict[str, Any], layers: int, fields: dict[str, Any]
) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for name in ("layer_types", "layers_block_type"):
        kinds = known.get(name)
        if isinstance(kinds, list) and kinds:
            each = list(dict.fromkeys(kinds))
            layers = max(layers, len(each))
            changed[name] = (each * layers)[:layers]
    if layers != LAYERS:
        names = ("num_hidden_layers", "n_layer", "num_layers")
        changed |= {name: layers for name in names if name in fields}
    return changed


def _parts(kind: Any, default: Any, own: dict[str, Any]) -> dict[str, Any]:
    parts = {}
    for name, part in (kind.sub_configs or {}).items():
        value = getattr(default, name, None)
        part_kind = type(value) if value is not None else part
        if not hasattr(part_kind, "sub_configs") or part_kind.__name__ in ANY_CONFIG:
            continue
        inner = {key.split(".", 1)[1]: it for key, it in own.items() if key.startswith(f"{name}.")}
        parts[name] = _tiny(part_kind, inner, SIZES if name in TEXT else VISION)
    return parts


def _rotations(known: dict[str, Any]) -> dict[str, Any]:
    rotations = {}
    for name in ("rope_parameters", "rope_scaling"):
        rotation = known.get(name)
        if isinstance(rotation, dict) and "mrope_section" in rotation:
            half = int(HEAD * rotation.get("partial_rotary_factor", 1)) // 2
            section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
            rotations[name] = {**rotation, "mrope_section": section}
    return rotations
