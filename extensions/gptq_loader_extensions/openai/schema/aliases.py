"""The names that local clients have for what OpenAI's API calls otherwise."""

from __future__ import annotations

from typing import Any

from gptq_loader_extensions.openai.errors import invalid

__all__ = ["ALIASES", "one_name_each"]

# As text-generation-webui, KoboldCpp, llama.cpp and Ollama call them.
ALIASES = {
    "max_context_length": "truncation_length",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_ctx": "truncation_length",
    "num_predict": "max_tokens",
    "rep_pen": "repetition_penalty",
    "rep_pen_range": "repetition_penalty_range",
    "repeat_last_n": "repetition_penalty_range",
    "repeat_penalty": "repetition_penalty",
    "sampler_seed": "seed",
    "stop_sequence": "stop",
    "stopping_strings": "stop",
}
RANDOM_SEED = -1  # what these clients send where OpenAI's send nothing


def one_name_each(fields: Any) -> Any:  # noqa: ANN401 - a body that was not checked yet
    """Give every option the one name it has here.

    Clients that do not know whom they talk to send an option under several names at once.

    Raises:
        ApiError: two names of one option have different values.
    """
    if not isinstance(fields, dict):
        return fields
    made = {name: it for name, it in fields.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if fields.get(alias) is None:
            continue
        if made.get(name) is None:
            made[name] = fields[alias]
        elif made[name] != fields[alias]:
            raise invalid(f"{alias} and {name} are one option, and differ; send one", param=alias)
    if made.get("seed") == RANDOM_SEED:
        made["seed"] = None
    return made
