"""The decoders of transformers that are made of parts which the native library has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gptq_loader_kernels.cpu.library import NormKind

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["FAMILIES", "Family", "family_of", "find"]

PROJECTIONS = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
}
PROJECTIONS_GLM = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": ("down",),
}
# Without gates: what is activated is `gate`, and there is no `up`.
UNGATED = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
}
JOINED = {
    "self_attn.qkv_proj": ("q", "k", "v"),
    "self_attn.o_proj": ("o",),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": ("down",),
}
NORMS = {"input_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm"}
SANDWICH = {
    "input_norm": "input_layernorm",
    "attention_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "output_norm": "post_feedforward_layernorm",
}
AFTER = {
    "attention_norm": "post_attention_layernorm",
    "output_norm": "post_feedforward_layernorm",
}
LATENT = {
    "self_attn.q_a_proj": ("q_a",),
    "self_attn.q_b_proj": ("q",),
    "self_attn.q_proj": ("q",),
    "self_attn.kv_a_proj_with_mqa": ("k",),
    "self_attn.kv_b_proj": ("kv_b",),
    "self_attn.o_proj": ("o",),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
}
GLM_NORMS = {
    **NORMS,
    "attention_norm": "post_self_attn_layernorm",
    "output_norm": "post_mlp_layernorm",
}
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}


@dataclass(frozen=True, slots=True)
class Family:
    """How a decoder is made of the library's parts.

    Attributes:
        name: what the names of its classes begin with.
        layer: the end of its layers' class.
        attention: the path of a layer's attention.
        embedding: the path of its embedding.
        last_norm: the path of the norm after its layers.
        projections: a layer's linears by path, and which projections are in each, side by side.
        in_turns: whether projections that share a linear take turns in it, a head of each.
        norms: a layer's norms, by the places that they have in `DecoderLayer`.
        norm_kind: what its norms compute.
        epsilon: the attribute of a norm that is added to the mean of squares.
        activation: the path of a layer's activation.
        slides: whether every layer attends to the config's window; else those that it lists.
        softcap: the attribute of its attention that caps scores, or None.
        neighbours: whether heads are rotated by pairs of neighbours, else by halves; or the setting
            that says so, where pairs are parted then.
        angles_repeated: whether each angle comes twice, one after the other.
        angles_once: whether each angle comes once; else all of them twice.
        rotates: the attribute of its attention that says whether it rotates; None for always.
        all_heads: whether queries and keys are normed over all heads.
        parallel: whether attention and the feed-forward part read the same x in every layer.
        norm: the end of its norms' class; None for torch's own LayerNorm.
        refused: settings of which the library has nothing, where they are set.
        angles_by_type: whether each type of layer is rotated by angles of its own.
        expert_size: the setting that has the width of an expert, of a mixture; or None.
        mixture: the end of its mixtures' class.
        router: the path of a mixture's router.
        router_kind: the end of its routers' class.
        correction: the path, in a mixture, of what is added to scores to choose by, if anything.
        shared: the path of a mixture's expert for every token, in those that have one.
        sigmoid: whether a router's scores are sigmoids, else a softmax.
        normed_heads: the attribute of its attention that says whether it norms queries and keys;
            None for as `norms` has it.
        groups_by_best: whether a group of experts ranks by its best one, else by its two best.
        latent: whether its attention is latent, as DeepSeek-V2's.
        clamps: whether its experts clamp gate and up, and add 1 to up.
        sinks: the attribute of its attention that joins each head's softmax, or None.
    """

    name: str
    layer: str = "DecoderLayer"
    attention: str = "self_attn"
    embedding: str = "embed_tokens"
    last_norm: str = "norm"
    projections: Mapping[str, tuple[str, ...]] = field(default_factory=PROJECTIONS.copy)
    in_turns: bool = False
    norms: Mapping[str, str] = field(default_factory=NORMS.copy)
    norm_kind: NormKind = NormKind.RMS
    epsilon: str = "variance_epsilon"
    activation: str = "mlp.act_fn"
    slides: bool = False
    softcap: str | None = None
    neighbours: bool | str = False
    angles_repeated: bool = False
    angles_once: bool = False
    rotates: str | None = None
    all_heads: bool = False
    parallel: bool = False
    norm: str | None = "RMSNorm"
    refused: tuple[str, ...] = ()
    angles_by_type: bool = False
    expert_size: str | None = None
    mixture: str = "SparseMoeBlock"
    router: str = "gate"
    router_kind: str = "TopKRouter"
    correction: str = "gate.e_score_correction_bias"
    shared: str = "shared_expert"
    sigmoid: bool = False
    normed_heads: str | None = None
    groups_by_best: bool = False
    latent: bool = False
    clamps: bool = False
    sinks: str | None = None


DEEPSEEK_V3: dict[str, Any] = {
    "projections": LATENT, "latent": True, "neighbours": "rope_interleave", "sigmoid": True,
    "expert_size": "moe_intermediate_size", "mixture": "MoE", "router_kind": "TopkRouter",
    "shared": "shared_experts",
}  # fmt: skip
FAMILIES = {
    "CohereModel": Family(
        "Cohere",
        norms=dict.fromkeys(NORMS, "input_layernorm"),
        norm="LayerNorm",
        norm_kind=NormKind.LAYER,
        neighbours=True,
        angles_repeated=True,
        parallel=True,
        refused=("use_qk_norm",),
    ),
    "Cohere2Model": Family(
        "Cohere2",
        norms=dict.fromkeys(NORMS, "input_layernorm"),
        norm="LayerNorm",
        norm_kind=NormKind.LAYER,
        neighbours=True,
        angles_repeated=True,
        rotates="sliding_window",
        parallel=True,
    ),
    "Gemma2Model": Family(
        "Gemma2",
        norms=SANDWICH,
        norm_kind=NormKind.RMS_ONE,
        epsilon="eps",
        softcap="attn_logit_softcapping",
    ),
    "Gemma3TextModel": Family(
        "Gemma3",
        norms=SANDWICH | HEAD_NORMS,
        norm_kind=NormKind.RMS_ONE,
        epsilon="eps",
        angles_by_type=True,
    ),
    "DeepseekV2Model": Family(
        "DeepseekV2",
        projections=LATENT,
        latent=True,
        neighbours=True,
        expert_size="moe_intermediate_size",
        mixture="Moe",
        router_kind="TopkRouter",
        shared="shared_experts",
        groups_by_best=True,
    ),
    "DeepseekV3Model": Family("DeepseekV3", **DEEPSEEK_V3),
    "Dots1Model": Family(
        "Dots1",
        norms=NORMS | HEAD_NORMS,
        expert_size="moe_intermediate_size",
        mixture="MoE",
        router_kind="TopkRouter",
        shared="shared_experts",
        sigmoid=True,
    ),
    "GPTNeoXModel": Family(
        "GPTNeoX",
        layer="Layer",
        attention="attention",
        embedding="embed_in",
        last_norm="final_layer_norm",
        projections={
            "attention.query_key_value": ("q", "k", "v"),
            "attention.dense": ("o",),
            "mlp.dense_h_to_4h": ("gate",),
            "mlp.dense_4h_to_h": ("down",),
        },
        in_turns=True,
        norm=None,
        norm_kind=NormKind.LAYER,
        epsilon="eps",
        activation="mlp.act",
    ),
    "GlmModel": Family(
        "Glm", projections=PROJECTIONS_GLM, activation="mlp.activation_fn", neighbours=True
    ),
    "Glm4Model": Family(
        "Glm4",
        projections=PROJECTIONS_GLM,
        norms=GLM_NORMS,
        activation="mlp.activation_fn",
        neighbours=True,
    ),
    "Glm4MoeModel": Family(
        "Glm4Moe",
        norms=NORMS | HEAD_NORMS,
        normed_heads="use_qk_norm",
        expert_size="moe_intermediate_size",
        mixture="MoE",
        router_kind="TopkRouter",
        shared="shared_experts",
        sigmoid=True,
    ),
    "Glm4MoeLiteModel": Family("Glm4MoeLite", **DEEPSEEK_V3),
    "GptOssModel": Family(
        "GptOss",
        angles_once=True,
        expert_size="intermediate_size",
        mixture="MLP",
        router="router",
        clamps=True,
        sinks="sinks",
    ),
    "GraniteModel": Family("Granite"),
    "LlamaModel": Family("Llama"),
    "MiniMaxM2Model": Family(
        "MiniMaxM2",
        norms=NORMS | HEAD_NORMS,
        all_heads=True,
        expert_size="intermediate_size",
        correction="e_score_correction_bias",
        sigmoid=True,
    ),
    "MistralModel": Family("Mistral", slides=True),
    "MixtralModel": Family("Mixtral", slides=True, expert_size="intermediate_size"),
    "Olmo2Model": Family("Olmo2", norms=AFTER | HEAD_NORMS, all_heads=True),
    "OlmoeModel": Family(
        "Olmoe",
        norms=NORMS | HEAD_NORMS,
        all_heads=True,
        expert_size="intermediate_size",
        refused=("clip_qkv",),
    ),
    "PhiModel": Family(
        "Phi",
        last_norm="final_layernorm",
        projections=UNGATED
        | {"self_attn.dense": ("o",), "mlp.fc1": ("gate",), "mlp.fc2": ("down",)},
        norms=dict.fromkeys(NORMS, "input_layernorm"),
        norm=None,
        norm_kind=NormKind.LAYER,
        epsilon="eps",
        activation="mlp.activation_fn",
        parallel=True,
        refused=("qk_layernorm",),
    ),
    "Phi3Model": Family("Phi3", projections=JOINED, activation="mlp.activation_fn", slides=True),
    "Qwen2Model": Family("Qwen2"),
    "Qwen2MoeModel": Family("Qwen2Moe", expert_size="moe_intermediate_size"),
    "Qwen3Model": Family("Qwen3", norms=NORMS | HEAD_NORMS),
    "Qwen3MoeModel": Family(
        "Qwen3Moe",
        norms=NORMS | HEAD_NORMS,
        slides=True,
        expert_size="moe_intermediate_size",
    ),
    "SeedOssModel": Family("SeedOss"),
    "SmolLM3Model": Family("SmolLM3", rotates="use_rope"),
    "StableLmModel": Family(
        "StableLm",
        norm=None,
        norm_kind=NormKind.LAYER,
        epsilon="eps",
        refused=("qk_layernorm",),
    ),
    "Starcoder2Model": Family(
        "Starcoder2",
        projections=UNGATED
        | {"self_attn.o_proj": ("o",), "mlp.c_fc": ("gate",), "mlp.c_proj": ("down",)},
        norm=None,
        norm_kind=NormKind.LAYER,
        epsilon="eps",
        activation="mlp.act",
        slides=True,
    ),
    "YoutuModel": Family("Youtu", projections=LATENT, latent=True, neighbours="rope_interleave"),
}


def family_of(decoder: Any) -> Family | None:  # noqa: ANN401 - any module, or none
    """Return how a decoder of transformers is made, where the library has its parts."""
    kind = type(decoder)
    return (
        FAMILIES.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None
    )


def find(owner: Any, path: str) -> Any:  # noqa: ANN401
    """Return what is at a path of attributes, or None."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner
