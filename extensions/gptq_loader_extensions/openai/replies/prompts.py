"""Score the tokens of a prompt, for a completion that requests no new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_extensions.openai.replies.scores import ScoredToken, score_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["next_logits", "score_prompt"]

CHUNK = 128  # tokens whose logits are in memory at a time: 25 MB in float32 for 49,152 of them


def score_prompt(
    model: LoadedModel, ids: Sequence[int], top: int, scored: list[ScoredToken]
) -> Iterator[None]:
    """Score each token by what the model expected there; the first has nothing before it.

    Args:
        model: the model.
        ids: the prompt's tokens.
        top: how many alternatives to report for each.
        scored: where the scores go; between two chunks it yields, for others to have their turn.
    """
    scored.append(ScoredToken(ids[0], None))
    for begin, logits in _prefill(model, ids):
        following = ids[begin + 1 : begin + 1 + len(logits)]
        scored += score_tokens(logits[: len(following)], following, top)
        yield


def next_logits(
    model: LoadedModel, ids: Sequence[int], logits: list[torch.Tensor]
) -> Iterator[None]:
    """Append the logits [vocabulary] of the token after a prompt; yields as `score_prompt` does."""
    last = None
    for _, chunk in _prefill(model, ids):
        last = chunk[-1].float()
        yield
    assert last is not None, "a prompt has at least one token"
    logits.append(last)


def _prefill(model: LoadedModel, ids: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
    """Prefill in chunks; yield where each begins, and its logits [tokens, vocabulary]."""
    import torch

    from gptq_loader_plugin.class_errors import class_errors
    from gptq_loader_plugin.generation.batch import TWICE
    from gptq_loader_plugin.generation.kv_cache import make_cache
    from gptq_loader_plugin.generation.model_runner import ModelRunner

    runner, cache = ModelRunner(model.model), make_cache(model.model)
    begin = 0
    while begin < len(ids):
        size = max(1, CHUNK * TWICE // (TWICE + begin)) if runner.takes_parts else len(ids)
        chunk = ids[begin : begin + size]
        with (
            class_errors(model.model.config.model_type, model.plan.path),
            torch.inference_mode(),  # not around a yield, which others run after
        ):
            logits, cache = runner.run(chunk, cache, past=begin, length=len(ids))
        yield begin, logits[0]
        begin += len(chunk)
