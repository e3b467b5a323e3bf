"""Turn the options of a request into the runs that an engine takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.engine import Run
from gptq_loader_extensions.openai.replies.processors import (
    EndBan,
    LogitBias,
    PresencePenalty,
    RecentPenalty,
    read_bias,
)
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_extensions.openai.schema.schemas import Sampling
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["make_options", "make_runs", "stop_texts"]

# The smallest probability mass that a client can mean by top_p 0, which keeps one token.
MIN_TOP_P = 1e-6
# Below it sampling is as good as greedy, and logits divided by it may be infinite.
MIN_TEMPERATURE = 1e-6


def make_options(request: Sampling, *, max_tokens: int) -> GenerateOptions:
    """Return generate's options, with this package's defaults for those a client leaves out.

    Raises:
        OptionInvalid: a value is out of range.
    """
    temperature = request.temperature
    fields: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "stop": stop_texts(request.stop),
        "stop_ids": tuple(request.stop_token_ids or ()),
        "seed": request.seed,
        "temperature": temperature if temperature is None or temperature > MIN_TEMPERATURE else 0,
        "min_p": request.min_p,
        "top_p": None if request.top_p is None else max(request.top_p, MIN_TOP_P),
        "top_k": None if request.top_k is None else max(request.top_k, 0),
    }
    if not request.repetition_penalty_range:
        fields["repetition_penalty"] = request.repetition_penalty
    return GenerateOptions.parse(
        {name: value for name, value in fields.items() if value is not None}
    )


def stop_texts(stop: str | list[str] | None) -> tuple[str, ...]:
    """Return the stop texts of a request, which may send one, several, or none."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


def make_runs(
    request: Sampling,
    model: LoadedModel,
    ids: Sequence[int],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    top_logprobs: int | None = None,
    more: Sequence[Callable[[], Any]] = (),
    shown: Sequence[str] = (),
) -> list[Run]:
    """Return the `n` runs that complete one prompt; each has its own seed, where there is one.

    Args:
        request: the request.
        model: the model that will answer.
        ids: the prompt's tokens.
        max_tokens: the limit of each reply.
        stop: the template's end texts.
        top_logprobs: as in `Run`.
        more: make what else changes the logits, for each reply anew.
        shown: as in `Run`.

    Raises:
        ApiError: an option names a token that this model does not have.
        OptionInvalid: a value is out of range.
    """
    options = make_options(request, max_tokens=max_tokens)
    for token in options.stop_ids:
        if token >= model.vocab_size:
            raise invalid(
                f"stop_token_ids: {token} is no token of this model, which has "
                f"{model.vocab_size:,}",
                param="stop_token_ids",
            )
    if options.seed is not None and options.seed + (request.n or 1) > 2**63:
        raise invalid("seed is too large for that many replies; choose a smaller one", param="seed")
    runs = []
    for i in range(request.n or 1):
        processors = _processors(request, model, len(ids))
        processors += [make() for make in more]
        if request.ignore_eos or request.min_tokens:  # last, as it looks at what the others leave
            end_ids = model.end_ids(stop) | set(options.stop_ids)
            minimum = None if request.ignore_eos else request.min_tokens
            processors.append(EndBan(len(ids), sorted(end_ids), tokens=minimum))
        seed = None if options.seed is None else options.seed + i
        own = options if i == 0 else options.model_copy(update={"seed": seed})
        runs.append(Run(ids, own, tuple(stop), processors, top_logprobs, shown))
    return runs


def _processors(request: Sampling, model: LoadedModel, begin: int) -> list[Any]:
    processors: list[Any] = []
    if request.repetition_penalty_range and request.repetition_penalty not in (None, 1):
        processors.append(
            RecentPenalty(float(request.repetition_penalty), request.repetition_penalty_range)
        )
    if request.presence_penalty or request.frequency_penalty:
        processors.append(
            PresencePenalty(
                begin,
                presence=request.presence_penalty or 0.0,
                frequency=request.frequency_penalty or 0.0,
            )
        )
    if request.logit_bias:
        processors.append(LogitBias(read_bias(request.logit_bias, model.vocab_size)))
    return processors
