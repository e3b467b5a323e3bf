"""Which kinds of checkpoint are read as a class that transformers has under another name.

Repositories of 2023 and 2024 brought Python code of their own, which is not run here. Where it
computes what a class of transformers computes, an entry of `FAMILIES` says in whose words: how
config.json's keys and the tensors are called there, and which tensors hold several of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["FAMILIES", "Family", "Fused"]

Config = dict[str, Any]


def _always(_: Config) -> bool:
    return True


def _nothing(_: Config) -> Config:
    return {}


@dataclass(frozen=True, slots=True)
class Fused:
    """One linear layer that holds those of queries, keys and values side by side.

    Attributes:
        name: its name, the end of its path, once renamed.
        grouped: whether its columns go group by group, the queries of a group before its key and
            its value; else all queries come first, then all keys, then all values.
    """

    name: str
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """How one kind of checkpoint is read.

    Attributes:
        model_type: what its config.json says it is.
        becomes: what transformers calls the same mathematics.
        when: whether a config.json of that `model_type` is of this kind.
        keys: the keys of config.json that have another name.
        sets: what config.json has no word for.
        computed: the same, worked out from config.json.
        needs: what config.json must say, where it says anything of it.
        names: patterns in tensors' names and what they become, in order. `LAST` stands for the
            number of blocks plus one.
        fused: the layer that is cut into q_proj, k_proj and v_proj.
        normalised: a tensor whose rows are made to have length one.
    """

    model_type: str
    becomes: str
    when: Callable[[Config], bool] = _always
    keys: Mapping[str, str] = field(default_factory=dict)
    sets: Mapping[str, Any] = field(default_factory=dict)
    computed: Callable[[Config], Config] = _nothing
    needs: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[tuple[str, str | Callable[[Any], str]], ...] = ()
    fused: Fused | None = None
    normalised: Callable[[Config], str] = lambda _: ""


def _falcon(config: Config) -> Config:
    """Recognise Falcon-40B's block, which has heads of keys and values of its own number."""
    return {"new_decoder_architecture": "n_head_kv" in config}


def _biased(config: Config) -> Config:
    """Return its attention biases where config.json does not say."""
    return {"attention_bias": config.get("bias", True)}


def _ungrouped(config: Config) -> Config:
    """Give every head its own keys and values where config.json does not say."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    return {"num_key_value_heads": heads}


def _internlm(config: Config) -> Config:
    """Take the base of its rotation; it stretches only past the context it was trained on."""
    rotary = config.get("rotary") or {}
    return {
        **_biased(config),
        "rope_theta": float(rotary.get("base", 10_000)),
        "rope_scaling": None,
    }


def _is_rotary_baichuan(config: Config) -> bool:
    """Recognise the 7B models, which rotate, from the 13B ones, whose config has no such limit."""
    return "max_position_embeddings" in config and config.get("hidden_size") != 5120


def _normalised_head(config: Config) -> str:
    """Name Baichuan 2's head; its vocabulary tells it from Baichuan 1, as it does in vLLM."""
    return "lm_head.weight" if config.get("vocab_size") == 125_696 else ""


def _qwen(config: Config) -> Config:
    """Halve its inner width; up to `seq_length` its attention neither stretches nor scales."""
    return {
        "intermediate_size": config["intermediate_size"] // 2,
        "max_position_embeddings": config["seq_length"],
        "num_key_value_heads": config["num_attention_heads"],
    }


def _chatglm(config: Config) -> Config:
    """Return its rotation's base, and its keys' and values' heads."""
    grouped = config.get("multi_query_attention", False)
    heads = config["multi_query_group_num"] if grouped else config["num_attention_heads"]
    return {
        "rope_theta": 10_000.0 * config.get("rope_ratio", 1),
        "num_key_value_heads": heads,
    }


def _minicpm(config: Config) -> Config:
    """Write its three scales as Granite's."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    return {
        "embedding_multiplier": config.get("scale_emb", 1),
        "residual_multiplier": config.get("scale_depth", 1) / layers**0.5,
        "logits_scaling": hidden / config.get("dim_model_base", 1),
        "attention_multiplier": (hidden // config["num_attention_heads"]) ** -0.5,
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
    }


def _phi(config: Config) -> Config:
    """Return the part of a head that is rotated."""
    return {
        "partial_rotary_factor": config["rotary_dim"] * config["n_head"] / config["n_embd"],
        "intermediate_size": config.get("n_inner") or 4 * config["n_embd"],
    }


def _superhot(config: Config) -> Config:
    """Stretch positions as its code does: by the context over the 2,048 tokens of LLaMA."""
    factor = config["max_position_embeddings"] / 2048
    return {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _is_superhot(config: Config) -> bool:
    return _code(config) == "modelling_llama.LlamaForCausalLM" and not config.get("rope_scaling")


def _code(config: Config) -> str:
    return str((config.get("auto_map") or {}).get("AutoModelForCausalLM", ""))


def _language_model(config: Config) -> Config:
    """Take the config of the language model inside; the one around it says what is tied."""
    text = config.get("text_config") or {}
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    parts = {"text_config": None, "vision_config": None, "tie_word_embeddings": tied}
    return {**text, **parts}


def _is_on(model_type: str, default: str | None = None) -> Callable[[Config], bool]:
    """Recognise a model with pictures by the language model it is built on."""

    def when(config: Config) -> bool:
        text = config["text_config"] if default is None else config.get("text_config", {})
        return bool(text.get("model_type", default) == model_type)

    return when


def _plain_rotation(config: Config) -> Config:
    """Rotate by one position: text has the same in all three that pictures tell apart."""
    text = {**config, **_language_model(config)}
    old = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = old.get("rope_type", old.get("type", "default"))
    new = {key: value for key, value in old.items() if key != "mrope_section"}
    new |= {"type": None, "rope_type": "default" if kind == "mrope" else kind}
    base = old.get("rope_theta", text.get("rope_theta", 1_000_000.0))
    return {
        **_language_model(config),
        "rope_scaling": None,
        "rope_parameters": {key: value for key, value in new.items() if value is not None}
        | {"rope_theta": float(base)},
    }


PHI_KEYS = {
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "layer_norm_eps",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_key_value_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
PHI_BLOCK: tuple[tuple[str, str], ...] = (
    (r"(layers\.\d+)\.ln\.", r"\1.input_layernorm."),
    (r"\.mixer\.out_proj\.", ".self_attn.dense."),
    (r"\.mixer\.", ".self_attn."),
)
FALCON_KEYS = {
    "n_embed": "hidden_size",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_layer": "num_hidden_layers",
}
INSIDE = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.language_model|language_model\.model)\.", "model."),
)

FAMILIES = (
    Family(
        "Yi",
        "llama",
        names=((r"\.ln1\.", ".input_layernorm."), (r"\.ln2\.", ".post_attention_layernorm.")),
    ),
    Family("RefinedWeb", "falcon", keys=FALCON_KEYS, computed=_falcon),
    Family("RefinedWebModel", "falcon", keys=FALCON_KEYS, computed=_falcon),
    Family("aquila", "llama"),
    Family("xverse", "llama"),
    Family("internlm", "llama", computed=_internlm),
    Family(
        "internlm2",
        "llama",
        computed=_biased,
        names=(
            (r"^model\.tok_embeddings\.", "model.embed_tokens."),
            (r"^output\.", "lm_head."),
            (r"\.attention\.wo\.", ".self_attn.o_proj."),
            (r"\.attention\.", ".self_attn."),
            (r"\.attention_norm\.", ".input_layernorm."),
            (r"\.ffn_norm\.", ".post_attention_layernorm."),
            (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
            (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
            (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
        ),
        fused=Fused("wqkv", grouped=True),
    ),
    Family(
        "baichuan",
        "llama",
        when=_is_rotary_baichuan,
        fused=Fused("W_pack"),
        normalised=_normalised_head,
    ),
    Family(
        "qwen",
        "qwen2",
        keys={
            "kv_channels": "head_dim",
            "layer_norm_epsilon": "rms_norm_eps",
            "rotary_emb_base": "rope_theta",
        },
        computed=_qwen,
        needs={"rotary_pct": 1.0, "scale_attn_weights": True, "no_bias": True},
        names=(
            (r"^transformer\.wte\.", "model.embed_tokens."),
            (r"^transformer\.ln_f\.", "model.norm."),
            (r"^transformer\.h\.", "model.layers."),
            (r"\.ln_1\.", ".input_layernorm."),
            (r"\.ln_2\.", ".post_attention_layernorm."),
            (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
            (r"\.attn\.", ".self_attn."),
            (r"\.mlp\.w1\.", ".mlp.up_proj."),
            (r"\.mlp\.w2\.", ".mlp.gate_proj."),
            (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
            (r"^transformer\.rotary_emb\.", "model.rotary_emb."),
        ),
        fused=Fused("c_attn"),
    ),
    Family(
        "chatglm",
        "glm",
        when=lambda config: "multi_query_attention" in config,
        keys={
            "add_qkv_bias": "attention_bias",
            "ffn_hidden_size": "intermediate_size",
            "kv_channels": "head_dim",
            "layernorm_epsilon": "rms_norm_eps",
            "num_layers": "num_hidden_layers",
            "padded_vocab_size": "vocab_size",
            "seq_length": "max_position_embeddings",
        },
        sets={"tie_word_embeddings": False},
        computed=_chatglm,
        needs={
            "add_bias_linear": False,
            "apply_residual_connection_post_layernorm": False,
            "interleaved_qkv": False,
            "original_rope": True,
            "post_layer_norm": True,
            "rmsnorm": True,
        },
        names=(
            (r"^transformer\.embedding\.word_embeddings\.", "model.embed_tokens."),
            (r"^transformer\.encoder\.final_layernorm\.", "model.norm."),
            (r"^transformer\.encoder\.", "model."),
            (r"^transformer\.output_layer\.", "lm_head."),
            (r"^transformer\.rotary_pos_emb\.", "model.rotary_emb."),
            (r"\.self_attention\.dense\.", ".self_attn.o_proj."),
            (r"\.self_attention\.", ".self_attn."),
            (r"\.mlp\.dense_h_to_4h\.", ".mlp.gate_up_proj."),
            (r"\.mlp\.dense_4h_to_h\.", ".mlp.down_proj."),
        ),
        fused=Fused("query_key_value"),
    ),
    Family(
        "stablelm_epoch",
        "stablelm",
        keys={"norm_eps": "layer_norm_eps", "rope_pct": "partial_rotary_factor"},
        computed=_ungrouped,
    ),
    Family(
        "orion",
        "stablelm",
        keys={"rms_norm_eps": "layer_norm_eps"},
        sets={"partial_rotary_factor": 1.0},
        computed=_ungrouped,
        needs={"attention_bias": False},
    ),
    Family(
        "phi-msft",
        "phi",
        keys=PHI_KEYS,
        computed=_phi,
        names=(
            (r"^transformer\.embd\.wte\.", "model.embed_tokens."),
            (r"^transformer\.h\.", "model.layers."),
            (r"^lm_head\.ln\.", "model.final_layernorm."),
            (r"^lm_head\.linear\.", "lm_head."),
            *PHI_BLOCK,
        ),
        fused=Fused("Wqkv"),
    ),
    Family(
        "mixformer-sequential",
        "phi",
        keys=PHI_KEYS,
        computed=_phi,
        names=(
            (r"^layers\.0\.wte\.", "model.embed_tokens."),
            (r"^layers\.LAST\.ln\.", "model.final_layernorm."),
            (r"^layers\.LAST\.linear\.", "lm_head."),
            (r"^layers\.(\d+)\.", lambda match: f"model.layers.{int(match[1]) - 1}."),
            *PHI_BLOCK,
        ),
        fused=Fused("Wqkv"),
    ),
    Family(
        "minicpm",
        "granite",
        when=lambda config: not config.get("num_experts"),
        computed=_minicpm,
    ),
    Family("llama", "llama", when=_is_superhot, computed=_superhot),
    *(
        Family("llava", text, when=_is_on(text, "llama"), computed=_language_model, names=INSIDE)
        for text in ("llama", "mistral", "qwen2")
    ),
    *(
        Family("mistral3", text, when=_is_on(text), computed=_language_model, names=INSIDE)
        for text in ("mistral", "ministral3")
    ),
    Family("qwen2_vl", "qwen2", computed=_plain_rotation, names=INSIDE),
    Family("qwen2_5_vl", "qwen2", computed=_plain_rotation, names=INSIDE),
)  # fmt: skip
