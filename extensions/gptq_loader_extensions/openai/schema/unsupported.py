"""Options of OpenAI's API and of local servers that are not supported here.

A value that turns an option off ("typical_p": 1) is accepted; any other is refused, because a
client that set it expects its effect. A few only say how sampling is done, change no promise, and
are listed in a header of the response.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptq_loader_extensions.openai.schema.schemas import Message, Sampling

__all__ = ["check_extra", "check_message"]

EMPTY: tuple[object, ...] = (None, "", [], {}, False, 0)

# The values of each that turn it off.
NEUTRAL: dict[str, tuple[object, ...]] = {
    # OpenAI's
    "audio": EMPTY,
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "functions": EMPTY,
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True),
    "prediction": EMPTY,
    "reasoning_effort": (None, "none"),
    "service_tier": (None, "auto", "default"),
    "store": EMPTY,
    "suffix": EMPTY,
    "verbosity": (None, "medium"),
    "web_search_options": EMPTY,
    # local servers'
    "add_bos_token": (None, True),
    "adaptive_target": (None, 0, -1, -0.01),
    "ban_eos_token": EMPTY,
    "banned_strings": EMPTY,
    "banned_tokens": EMPTY,
    "cfg_scale": (None, 1),
    "custom_token_bans": EMPTY,
    "do_sample": (None, True),
    "dry_multiplier": EMPTY,
    "dynamic_temperature": EMPTY,
    "dynatemp_range": EMPTY,
    "early_stopping": EMPTY,
    "encoder_repetition_penalty": (None, 1),
    "epsilon_cutoff": EMPTY,
    "eta_cutoff": EMPTY,
    "grammar": EMPTY,
    "grammar_string": EMPTY,
    "guidance_scale": (None, 1),
    "guided_grammar": EMPTY,
    "guided_json": EMPTY,
    "guided_regex": EMPTY,
    "ignore_eos": EMPTY,
    "images": EMPTY,
    "json_schema": EMPTY,
    "length_penalty": (None, 1),
    "logits_bias": EMPTY,
    "max_tokens_second": EMPTY,
    "min_keep": (None, 0, 1),
    "min_length": EMPTY,
    "min_tokens": EMPTY,
    "mirostat": EMPTY,
    "mirostat_mode": EMPTY,
    "negative_prompt": EMPTY,
    "no_repeat_ngram_size": EMPTY,
    "nsigma": EMPTY,
    "num_beams": (None, 1),
    "penalty_alpha": EMPTY,
    "replacement": EMPTY,
    "rep_pen_slope": (None, 0, 1),
    "singleline": EMPTY,
    "skew": EMPTY,
    "skip_special_tokens": (None, True),
    "smoothing_factor": EMPTY,
    "speculative_ngram": EMPTY,
    "tfs": (None, 0, 1),
    "tfs_z": (None, 0, 1),
    "top_a": EMPTY,
    "top_n_sigma": (None, 0, -1),
    "typical": (None, 0, 1),
    "typical_p": (None, 0, 1),
    "use_authors_note": EMPTY,
    "use_memory": EMPTY,
    "use_story": EMPTY,
    "use_world_info": EMPTY,
    "xtc_probability": EMPTY,
}
# They belong to an option above, or to another server's interface, and have no effect alone.
WITHOUT_EFFECT = frozenset(
    {
        "adaptive_decay",
        "api_server",
        "can_abort",
        "include_reasoning",
        "n_probs",
        "api_type",
        "auto_max_new_tokens",
        "chat_id",
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "dynatemp_high",
        "dynatemp_low",
        "dynatemp_max",
        "dynatemp_min",
        "id",
        "max_temp",
        "metadata",
        "min_temp",
        "mirostat_eta",
        "mirostat_tau",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "sequence_breakers",
        "session_id",
        "smoothing_curve",
        "spaces_between_special_tokens",
        "trim_stop",
        "use_default_badwordsids",
        "xtc_threshold",
    }
)
# How other servers sample: here it is fixed, and the header x-ignored-options names them.
IGNORED = frozenset({"quiet", "sampler_order", "sampler_priority", "samplers", "temperature_last"})


def check_extra(request: Sampling) -> tuple[str, ...]:
    """Refuse options that are not supported; return the names of those that are ignored.

    Raises:
        ApiError: an option is unknown, or asks for what is not done here.
    """
    return _check(request.model_extra or {})


def check_message(message: Message, index: int) -> None:
    """Refuse a message without content, or with anything but text, unless that is empty.

    Raises:
        ApiError: there is no content, or something in it would be lost.
    """
    if message.content is None and message.role != "assistant":
        raise invalid(f"message {index} has no content", param=f"messages.{index}.content")
    for name, value in (message.model_extra or {}).items():
        if value not in EMPTY:
            raise invalid(
                f"message {index} has {name!r}, which is not understood here; send text alone",
                param=f"messages.{index}.{name}"[:200],
            )


def _check(extra: Mapping[str, Any]) -> tuple[str, ...]:
    for name, value in extra.items():
        if name in WITHOUT_EFFECT or name in IGNORED:
            continue
        if name not in NEUTRAL:
            raise invalid(
                f"there is no option {name[:100]!r}; correct its spelling, or leave it out",
                param=name[:200],
                code="unknown_option",
            )
        if value not in NEUTRAL[name]:
            raise invalid(
                f"{name} is not supported here; leave it out",
                param=name[:200],
                code="unsupported_option",
            )
    return tuple(sorted(IGNORED & set(extra)))
