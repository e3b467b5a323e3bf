"""Pick the next token of many replies at a time, on their device, without waiting for it.

What is picked is what `Sampler` picks by transformers' processors, but for the draw: a random
number of each candidate follows from the seed, how many tokens there are, and the candidate's id,
so that a reply is the same alone and beside others, and on every device. The likeliest of the
candidates, each with a Gumbel variate added, is a draw by their probabilities (arXiv:1611.01144).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["Row", "pick_tokens", "to_device"]

TIES = 8  # tokens past top_k that are looked at: those as likely as the last one count too
# The constants of SplitMix64 (doi:10.1145/2714064.2660195), as signed numbers.
STEPS = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
UNIFORM_BITS = 24  # what a float32 holds


@dataclass(slots=True)
class Row:
    """How the token of one reply is picked.

    Attributes:
        options: how to sample.
        banned: tokens that are never picked, bool [vocabulary]; None where all may be.
        seed: of its draws.
        num_sampled: how many tokens were picked.
    """

    options: GenerateOptions
    banned: torch.Tensor | None
    seed: int
    num_sampled: int = 0

    @classmethod
    def of(
        cls,
        options: GenerateOptions,
        banned_ids: Sequence[int],
        vocabulary: int,
        device: torch.device,
    ) -> Row:
        """Make the row of a reply."""
        banned = None
        if banned_ids:
            banned = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            banned[list(banned_ids)] = True
        seed = secrets.randbits(63) if options.seed is None else options.seed
        return cls(options, banned, (seed + 2**63) % 2**64 - 2**63)


def pick_tokens(
    rows: Sequence[Row],
    sequences: Sequence[torch.Tensor],
    logits: torch.Tensor,
    *,
    uncounted: int = 0,
) -> torch.Tensor:
    """Pick a token of each reply.

    Args:
        rows: how.
        sequences: the tokens of each so far, int64 [1, n], which a penalty goes by.
        logits: [rows, vocabulary].
        uncounted: how many tokens were picked that no row has counted yet.

    Returns:
        int64 [rows].
    """
    scores = _penalised(rows, sequences, logits)
    if all(row.options.temperature == 0 for row in rows):
        return scores.max(dim=-1).indices  # faster than argmax, and the first one too
    vocabulary, device = scores.shape[-1], scores.device
    limits = [
        1 if row.options.temperature == 0 else row.options.top_k or vocabulary for row in rows
    ]
    limits = [min(limit, vocabulary) for limit in limits]
    scores, ids = scores.float().topk(min(max(limits) + TIES, vocabulary))
    values = [
        (limit - 1, row.options.temperature or 1.0, row.options.top_p, row.options.min_p)
        for row, limit in zip(rows, limits, strict=True)
    ]
    columns = to_device(values, torch.float32, device)
    last, temperature, top_p, min_p = (columns[:, i : i + 1] for i in range(4))
    kept = scores >= scores.gather(1, last.long())
    scores = (scores / temperature).masked_fill(~kept, float("-inf"))
    probabilities = scores.softmax(dim=-1)
    kept &= (probabilities.cumsum(dim=-1) - probabilities < top_p) | (top_p >= 1)
    kept &= probabilities >= min_p * probabilities[:, :1]
    kept[:, 0] = True
    counts = [row.num_sampled + uncounted for row in rows]
    noise = _gumbel([row.seed for row in rows], counts, ids)
    greedy = to_device([[row.options.temperature == 0] for row in rows], torch.bool, device)
    noise = noise.masked_fill(greedy, 0.0)
    at = (scores + noise).masked_fill(~kept, float("-inf")).max(dim=-1, keepdim=True).indices
    return ids.gather(1, at)[:, 0]


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Copy numbers to a device without waiting for what it computes."""
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def _penalised(
    rows: Sequence[Row], sequences: Sequence[torch.Tensor], logits: torch.Tensor
) -> torch.Tensor:
    """Make tokens that were there before less likely, and banned ones impossible."""
    penalised = [i for i, row in enumerate(rows) if row.options.repetition_penalty != 1]
    banned = [i for i, row in enumerate(rows) if row.banned is not None]
    if not penalised and not banned:
        return logits
    scores = logits.float()
    if scores is logits:
        scores = logits.clone()
    for i in penalised:
        own, penalty = sequences[i][0], rows[i].options.repetition_penalty
        before = scores[i].gather(0, own)
        scores[i].scatter_(0, own, torch.where(before < 0, before * penalty, before / penalty))
    for i in banned:
        scores[i].masked_fill_(rows[i].banned, float("-inf"))  # type: ignore[arg-type]
    return scores


def _gumbel(seeds: Sequence[int], counts: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
    """Draw a Gumbel variate for each candidate: ids int64 [rows, n] -> float32 [rows, n]."""
    numbers = to_device([seeds, counts], torch.int64, ids.device)
    state = numbers[0][:, None]
    for more in (numbers[1][:, None], ids):
        state = _mix(state + STEPS[0] * (more + 1))
    uniform = _shifted(state, 64 - UNIFORM_BITS).float().add_(0.5).mul_(2.0**-UNIFORM_BITS)
    return -torch.log(-torch.log(uniform))


def _mix(state: torch.Tensor) -> torch.Tensor:
    """Return a number whose bits all depend on all of another's (SplitMix64)."""
    state = (state ^ _shifted(state, 30)) * STEPS[1]
    state = (state ^ _shifted(state, 27)) * STEPS[2]
    return state ^ _shifted(state, 31)


def _shifted(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift int64 to the right, zeros coming from the left."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
