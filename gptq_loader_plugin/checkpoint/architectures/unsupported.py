"""Which kinds of checkpoint are refused, since no class of transformers computes what they do.

Most would end in an error that says less. Those of GPT-2's and MPT's names would be built as what
they are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["REFUSED", "SAME_CODE", "Refused"]

Config = dict[str, Any]


def _always(_: Config) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Refused:
    """A kind of checkpoint that is refused.

    Attributes:
        model_type: what its config.json says it is.
        reason: what it is and does, in words that follow its name.
        when: whether a config.json of that `model_type` is of this kind.
    """

    model_type: str
    reason: str
    when: Callable[[Config], bool] = _always


def _mpt_differs(config: Config) -> bool:
    """Recognise an MPT model with what transformers' class passes over in silence."""
    attention = config.get("attn_config") or {}
    usual = {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_type": "multihead_attention",
        "prefix_lm": False,
        "qk_ln": False,
    }
    differs = any(attention.get(key, value) != value for key, value in usual.items())
    return differs or config.get("logit_scale") is not None or "alibi" in config


REFUSED = (
    Refused(
        "baichuan",
        "has attention that fades with distance (ALiBi) in a block that no class of transformers "
        "has",
    ),
    Refused("chatglm", "is ChatGLM of the first generation, with two positions for each token"),
    Refused("minicpm", "is a mixture of experts that no class of transformers has"),
    Refused("mpt", "has attention that transformers' class of that name lacks", when=_mpt_differs),
    Refused(
        "gpt2",
        "is SantaCoder, whose queries and keys are not GPT-2's",
        when=lambda config: config.get("attention_head_type") == "multiquery",
    ),
    *(
        Refused(name, "brings Python code of its own, which is not run, and no class of "
                "transformers computes the same")
        for name in (
            "codeshell", "dbrx_converted", "deci", "decilm", "grok-1", "internlmxcomposer",
            "longllama", "moss", "skywork_moe", "stablelm_alpha", "telechat",
        )
    ),
)  # fmt: skip

# Those whose own code computes what transformers' class of the same name does, so that passing
# it over needs no warning.
SAME_CODE = frozenset({
    "cohere", "deepseek_v2", "deepseek_v3", "exaone", "falcon", "gpt_bigcode", "internlm3",
    "minicpm3", "mpt", "olmo", "phi", "phi3", "phimoe", "stablelm", "starcoder2",
})  # fmt: skip
