"""Score the tokens of a prompt: what a completion without new tokens asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.replies.scores import ScoredToken, score_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["next_logits", "score_prompt"]

PART = 128  # tokens whose logits are in memory at a time: 25 MB in float32 for 49,152 of them


def score_prompt(model: LoadedModel, ids: Sequence[int], top: int) -> list[ScoredToken]:
    """Score each token by what the model expected there; the first has nothing before it."""
    import torch

    steps = [ScoredToken(ids[0], None)]
    with torch.inference_mode():
        for begin, logits in _parts(model, ids):
            following = ids[begin + 1 : begin + 1 + len(logits)]
            steps += score_tokens(logits[: len(following)], following, top)
    return steps


def next_logits(model: LoadedModel, ids: Sequence[int]) -> torch.Tensor:
    """Give the logits [vocabulary] of what follows a prompt."""
    import torch

    with torch.inference_mode():
        *_, (_, logits) = _parts(model, ids)
    last: torch.Tensor = logits[-1].float()
    return last


def _parts(model: LoadedModel, ids: Sequence[int]) -> Any:  # noqa: ANN401 - an iterator of pairs
    """Read a prompt in parts; give where each begins, and its logits [tokens, vocabulary]."""
    import torch

    from gptq_loader_plugin.generation.kv_cache import make_cache
    from gptq_loader_plugin.transformers_compat import cache_argument

    cache = {cache_argument(model.model): make_cache(model.model)}
    cached: dict[str, Any] = {**cache, "use_cache": True}
    sequence = torch.tensor([list(ids)], device=model.model.device)
    for begin in range(0, len(ids), PART):
        part = sequence[:, begin : begin + PART]
        yield begin, model.model(input_ids=part, **cached).logits[0]
