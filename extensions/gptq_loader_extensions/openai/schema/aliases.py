"""The names that local clients have for options of OpenAI's API."""

from __future__ import annotations

from typing import Any

from gptq_loader_extensions.openai.errors import invalid

__all__ = ["ALIASES", "resolve_aliases"]

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


def resolve_aliases(fields: Any) -> Any:  # noqa: ANN401 - a body that was not checked yet
    """Return the body with every option under the one name it has here.

    Clients that do not know which server they talk to send an option under several names at once.

    Raises:
        ApiError: two names of one option have different values.
    """
    if not isinstance(fields, dict):
        return fields
    resolved = {name: value for name, value in fields.items() if name not in ALIASES}
    for alias, name in ALIASES.items():
        if fields.get(alias) is None:
            continue
        if resolved.get(name) is None:
            resolved[name] = fields[alias]
        elif resolved[name] != fields[alias]:
            raise invalid(f"{alias} and {name} are one option, and differ; send one", param=alias)
    if resolved.get("seed") == RANDOM_SEED:
        resolved["seed"] = None
    return resolved
