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
    "background": EMPTY,
    "best_of": (None, 1),
    "context_management": EMPTY,
    "conversation": EMPTY,
    "function_call": (None, "none"),
    "functions": EMPTY,
    "modalities": (None, ["text"]),
    "max_tool_calls": EMPTY,
    "prompt": EMPTY,
    "suffix": EMPTY,
    "web_search_options": EMPTY,
    # local servers'
    "adaptive_target": (None, 0, -1, -0.01),
    "add_bos_token": (None, True),
    "add_special_tokens": (None, False),  # a template writes them itself
    "allowed_token_ids": EMPTY,
    "bad_words": EMPTY,
    "ban_eos_token": EMPTY,
    "banned_strings": EMPTY,
    "banned_tokens": EMPTY,
    "cfg_scale": (None, 1),
    "chat_template": EMPTY,
    "custom_logit_processor": EMPTY,
    "custom_params": EMPTY,
    "custom_token_bans": EMPTY,
    "detokenize": (None, True),
    "do_sample": (None, True),
    "documents": EMPTY,
    "dry_multiplier": EMPTY,
    "dynamic_temperature": EMPTY,
    "dynatemp_range": EMPTY,
    "early_stopping": EMPTY,
    "enable_search": EMPTY,
    "echo": EMPTY,
    "encoder_repetition_penalty": (None, 1),
    "eos_token_id": EMPTY,
    "epsilon_cutoff": EMPTY,
    "eta_cutoff": EMPTY,
    "guidance_scale": (None, 1),
    "images": EMPTY,
    "incremental_output": (None, True),
    "include_stop_str_in_output": EMPTY,
    "kv_transfer_params": EMPTY,
    "length_penalty": (None, 1),
    "logits_bias": EMPTY,
    "logits_processors": EMPTY,
    "lora": EMPTY,
    "lora_path": EMPTY,
    "max_tokens_second": EMPTY,
    "media_io_kwargs": EMPTY,
    "min_keep": (None, 0, 1),
    "min_length": EMPTY,
    "mirostat": EMPTY,
    "mirostat_mode": EMPTY,
    "mm_processor_kwargs": EMPTY,
    "models": EMPTY,
    "n_discard": EMPTY,
    "n_indent": EMPTY,
    "n_keep": (None, 0, -1),
    "negative_prompt": EMPTY,
    "no_repeat_ngram_size": EMPTY,
    "no_stop_trim": EMPTY,
    "nsigma": EMPTY,
    "num_beams": (None, 1),
    "num_keep": (None, 0, -1),
    "penalize_newline": (None, False),
    "penalty_alpha": EMPTY,
    "plugins": EMPTY,
    "post_sampling_probs": EMPTY,
    "prompt_embeds": EMPTY,
    "prompt_logprobs": EMPTY,
    "provider": EMPTY,
    "reasoning_split": (None, True),
    "rep_pen_slope": (None, 0, 1),
    "repetition_detection": EMPTY,
    "replacement": EMPTY,
    "response_fields": EMPTY,
    "return_hidden_states": EMPTY,
    "return_token_ids": EMPTY,
    "return_tokens": EMPTY,
    "return_tokens_as_token_ids": EMPTY,
    "safe_prompt": EMPTY,
    "singleline": EMPTY,
    "skew": EMPTY,
    "skip_special_tokens": (None, True),
    "smoothing_factor": EMPTY,
    "speculative_ngram": EMPTY,
    "stop_regex": EMPTY,
    "structural_tag": EMPTY,
    "t_max_predict_ms": (None, 0, -1),
    "tfs": (None, 0, 1),
    "tfs_z": (None, 0, 1),
    "thinking_forced_open": EMPTY,
    "top_a": EMPTY,
    "top_n_sigma": (None, 0, -1),
    "transforms": EMPTY,
    "truncate_prompt_tokens": (*EMPTY, -1),
    "typical": (None, 0, 1),
    "typical_p": (None, 0, 1),
    "use_authors_note": EMPTY,
    "use_beam_search": EMPTY,
    "use_memory": EMPTY,
    "use_story": EMPTY,
    "use_world_info": EMPTY,
    "vllm_xargs": EMPTY,
    "xtc_probability": EMPTY,
}
# They belong to an option above, or to another server's interface, and have no effect alone.
WITHOUT_EFFECT = frozenset(
    {
        "adaptive_decay",
        "api_server",
        "api_type",
        "auto_max_new_tokens",
        "cache_control",
        "cache_prompt",
        "cache_salt",
        "can_abort",
        "chat_id",
        "client_metadata",
        "dry_allowed_length",
        "dry_base",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "dynatemp_high",
        "dynatemp_low",
        "dynatemp_max",
        "dynatemp_min",
        "guided_decoding_backend",
        "guided_whitespace_pattern",
        "id",
        "id_slot",
        "keep_alive",
        "max_temp",
        "metadata",
        "min_temp",
        "mirostat_eta",
        "mirostat_tau",
        "n_probs",
        "parse_tool_calls",
        "priority",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "return_progress",
        "rid",
        "safety_identifier",
        "sequence_breakers",
        "session_id",
        "smoothing_curve",
        "spaces_between_special_tokens",
        "stream_reasoning",
        "timings_per_token",
        "tool_stream",
        "trim_stop",
        "use_default_badwordsids",
        "xtc_threshold",
    }
)
# They say how a reply is made and not what it is: the header x-ignored-options names them. The
# order of samplers is fixed here, and there is no store of chats, no tier, no measure of words; a
# prediction would only make a reply faster.
IGNORED = frozenset(
    {
        "prediction",
        "quiet",
        "sampler_order",
        "sampler_priority",
        "samplers",
        "service_tier",
        "store",
        "temperature_last",
        "verbosity",
    }
)
# Values of those that ask for nothing.
UNTOLD: dict[str, tuple[object, ...]] = {
    "service_tier": ("auto", "default"),
    "store": (False,),
    "verbosity": ("medium",),
}
# What clients send back of a reply of another server's.
OF_REPLIES = frozenset(
    {"provider_specific_fields", "reasoning_details", "thinking_blocks", "cache_control", "id"}
)
# What to do in place of what is often sent by mistake, or was OpenAI's before.
INSTEAD = {
    "extra_body": "is an argument of OpenAI's Python client; send what is in it as fields of the "
    "request",
    "function_call": "is OpenAI's older name; send tool_choice",
    "functions": "is OpenAI's older name; send tools",
}


def check_extra(request: Sampling) -> tuple[str, ...]:
    """Refuse options that are not supported; return the names of those that are ignored.

    Raises:
        ApiError: an option is unknown, or asks for what is not done here.
    """
    return _check(request.model_extra or {})


def check_message(message: Message, index: int) -> tuple[str, ...]:
    """Refuse a message without content, or with anything but text, unless that is empty.

    Returns:
        The names of what is ignored in it.

    Raises:
        ApiError: there is no content, or something in it would be lost.
    """
    if message.content is None and message.role != "assistant":
        raise invalid(f"message {index} has no content", param=f"messages.{index}.content")
    for name, value in (message.model_extra or {}).items():
        if value not in EMPTY and name not in OF_REPLIES:
            raise invalid(
                f"message {index} has {name!r}, which is not understood here; send text alone",
                param=f"messages.{index}.{name}"[:200],
            )
    extra = message.model_extra or {}
    return tuple(f"messages.{name}" for name in OF_REPLIES & set(extra) if extra[name] not in EMPTY)


def _check(extra: Mapping[str, Any]) -> tuple[str, ...]:
    for name, value in extra.items():
        if name in WITHOUT_EFFECT or name in IGNORED or value is None:
            continue
        if name in INSTEAD and value not in NEUTRAL.get(name, ()):
            raise invalid(f"{name} {INSTEAD[name]}", param=name, code="unsupported_option")
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
    return tuple(
        sorted(
            name
            for name, value in extra.items()
            if name in IGNORED and value is not None and value not in UNTOLD.get(name, ())
        )
    )
