"""Score the tokens of a prompt, for a completion that requests no new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.replies.scores import ScoredToken, score_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["next_logits", "score_prompt"]

CHUNK = 128  # tokens whose logits are in memory at a time: 25 MB in float32 for 49,152 of them


def score_prompt(model: LoadedModel, ids: Sequence[int], top: int) -> list[ScoredToken]:
    """Score each token by what the model expected there; the first has nothing before it."""
    import torch

    scored = [ScoredToken(ids[0], None)]
    with torch.inference_mode():
        for begin, logits in _prefill(model, ids):
            following = ids[begin + 1 : begin + 1 + len(logits)]
            scored += score_tokens(logits[: len(following)], following, top)
    return scored


def next_logits(model: LoadedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits [vocabulary] of the token after a prompt."""
    import torch

    with torch.inference_mode():
        *_, (_, logits) = _prefill(model, ids)
    last: torch.Tensor = logits[-1].float()
    return last


def _prefill(model: LoadedModel, ids: Sequence[int]) -> Any:  # noqa: ANN401 - an iterator of pairs
    """Prefill in chunks; yield where each begins, and its logits [tokens, vocabulary]."""
    import torch

    from gptq_loader_plugin.generation.kv_cache import make_cache
    from gptq_loader_plugin.transformers_compat import cache_argument

    cache = {cache_argument(model.model): make_cache(model.model)}
    cached: dict[str, Any] = {**cache, "use_cache": True}
    sequence = torch.tensor([list(ids)], device=model.model.device)
    for begin in range(0, len(ids), CHUNK):
        chunk = sequence[:, begin : begin + CHUNK]
        yield begin, model.model(input_ids=chunk, **cached).logits[0]
