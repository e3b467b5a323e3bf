"""The names that local clients have for options of OpenAI's API."""

from __future__ import annotations

from typing import Any

from gptq_loader_extensions.openai.errors import invalid

__all__ = ["ALIASES", "resolve_aliases", "sent_name"]

# As text-generation-webui, KoboldCpp, llama.cpp, Ollama and Mistral call them.
ALIASES = {
    "max_context_length": "truncation_length",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_ctx": "truncation_length",
    "num_predict": "max_tokens",
    "random_seed": "seed",
    "reasoning_budget": "thinking_budget",
    "rep_pen": "repetition_penalty",
    "rep_pen_range": "repetition_penalty_range",
    "repeat_last_n": "repetition_penalty_range",
    "repeat_penalty": "repetition_penalty",
    "sampler_seed": "seed",
    "stop_sequence": "stop",
    "stopping_strings": "stop",
    "thinking_budget_tokens": "thinking_budget",
}
RANDOM_SEED = -1  # what these clients send where OpenAI's send nothing
UNLIMITED = (-1, -2)  # as many tokens as there is room for; llama.cpp and Ollama have both
MAX_TOKENS = 2**31 - 1


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
    _resolve_values(resolved)
    return resolved


def _resolve_values(resolved: dict[str, Any]) -> None:
    """Write values that other servers have for "any" or "all" as this one does."""
    if resolved.get("seed") == RANDOM_SEED:
        resolved["seed"] = None
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        if _is_in(resolved.get(name), UNLIMITED):
            resolved[name] = MAX_TOKENS
    if _is_in(resolved.get("repetition_penalty_range"), (-1,)):  # all there is
        resolved["repetition_penalty_range"] = None
    if _is_in(resolved.get("truncation_length"), (-1, 0)):
        resolved["truncation_length"] = None


def sent_name(fields: Any, name: str) -> str:  # noqa: ANN401 - a body
    """Return the name under which a client sent an option."""
    if not isinstance(fields, dict) or fields.get(name) is not None:
        return name
    sent = (
        alias
        for alias, option in ALIASES.items()
        if option == name and fields.get(alias) is not None
    )
    return next(sent, name)


def _is_in(value: object, numbers: tuple[int, ...]) -> bool:
    return type(value) is int and value in numbers
