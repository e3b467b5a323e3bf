"""Pick the next token: transformers' own processors, on as few tokens as can be picked.

With top_k, which the defaults have, only the likeliest tokens are sorted, scaled and summed: over a
vocabulary of 49,152 that took a third as long as SmolLM2-135M takes for all else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LogitsProcessor, LogitsProcessorList

    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["Sampler"]

TIES = 8  # tokens past top_k that are looked at: those as likely as the last one count too


class Sampler:
    """Pick tokens as `options` say.

    Args:
        options: how to sample.
        banned_ids: tokens that are never picked: the embedding's padding.
        device: where the logits are.
        processors: a caller's own, which see the whole vocabulary and come last of those that do.

    Attributes:
        reads_sequence: whether picking a token goes by those before it.
    """

    def __init__(
        self,
        options: GenerateOptions,
        banned_ids: Sequence[int],
        device: torch.device,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self._greedy = options.temperature == 0
        self._top_k = 0 if self._greedy else options.top_k
        self._whole = _of_the_vocabulary(options, banned_ids, device)
        self._whole.extend(processors)
        self.reads_sequence = bool(processors) or options.repetition_penalty != 1
        # What a caller's processor, or a penalty that rewards, makes likeliest cannot be foreseen.
        self._foreseen = not processors and options.repetition_penalty >= 1
        self._penalised = options.repetition_penalty > 1
        self._banned_ids = list(banned_ids)
        self._some = _of_candidates(options)
        self._generator = None if self._greedy else torch.Generator(device=device)
        if self._generator is None:
            return
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def sample(self, sequence: torch.Tensor, logits: torch.Tensor) -> int:
        """Pick a token to follow `sequence` [1, n] by its logits [1, vocabulary]."""
        if self._greedy:
            return _find_greatest(self._scores(sequence, logits))
        probabilities, ids = self.candidates(sequence, logits)
        at = torch.multinomial(probabilities, 1, generator=self._generator)
        return int(at if ids is None else ids[0, at[0]])

    def needed_logits(self) -> int:
        """Return how many of the greatest logits sampling needs; 0 where it needs all of them."""
        if not self._foreseen:
            return 0
        return 1 if self._greedy else self._top_k

    def excluded(self, sequence: torch.Tensor, vocabulary: int) -> torch.Tensor | None:
        """Mark the tokens that sampling makes less probable: bool [vocabulary], or None.

        As many others as are needed must then be there.
        """
        if not self._penalised and not self._banned_ids:
            return None
        marks = torch.zeros(vocabulary, dtype=torch.bool, device=sequence.device)
        marks[self._banned_ids] = True
        if self._penalised:
            marks[sequence[0]] = True
        return marks

    def candidates(
        self, sequence: torch.Tensor, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the probabilities [1, n] of the tokens that may be picked, and which those are.

        No ids stand for the whole vocabulary.
        """
        scores = self._scores(sequence, logits)
        ids = None
        if 0 < self._top_k < scores.shape[-1]:
            scores, ids = _top_k_and_ties(scores, self._top_k)
        scores = self._some(sequence, scores.to(torch.float32))  # type: ignore[arg-type]
        return scores.softmax(dim=-1), ids

    def _scores(self, sequence: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if not self._whole:
            return logits
        return self._whole(sequence, logits.to(torch.float32))  # type: ignore[arg-type]


def _find_greatest(scores: torch.Tensor) -> int:
    """Return the place of the greatest score [1, n], the first one of those that tie.

    Bits of positive numbers are in their order as whole numbers, and above all others; numpy looks
    for the greatest of those ten times as fast.
    """
    integers = {2: torch.int16, 4: torch.int32}.get(scores.element_size())
    if integers is not None and scores.device.type == "cpu":
        whole = scores[0].view(integers).numpy()
        at = int(whole.argmax())
        if whole[at] > 0:
            return at
    return int(scores.max(dim=-1).indices)  # faster than argmax, and the first one too


def _top_k_and_ties(scores: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the `top_k` greatest scores, and what ties with the last of them, in order of ids."""
    best, ids = scores.topk(min(top_k + TIES, scores.shape[-1]))
    threshold = best[0, top_k - 1]
    if best[0, -1] == threshold:
        ids = (scores[0] >= threshold).nonzero().T
        return scores[:, ids[0]], ids
    ids = ids[:, best[0] >= threshold].sort().values
    return scores[:, ids[0]], ids


def _of_the_vocabulary(
    options: GenerateOptions, banned_ids: Sequence[int], device: torch.device
) -> LogitsProcessorList:
    """Line up the processors that go by token, in the order transformers' `generate` has them."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as process

    processors = LogitsProcessorList()
    if options.repetition_penalty != 1.0:
        processors.append(process.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if banned_ids:
        processors.append(
            process.SuppressTokensLogitsProcessor(list(banned_ids), device=str(device))
        )
    return processors


def _of_candidates(options: GenerateOptions) -> LogitsProcessorList:
    """Line up those that go by score; top_k itself is `_likeliest`."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as process

    processors = LogitsProcessorList()
    if options.temperature not in (0, 1):
        processors.append(process.TemperatureLogitsWarper(options.temperature))
    if options.temperature > 0 and options.top_p < 1:
        processors.append(process.TopPLogitsWarper(options.top_p))
    if options.temperature > 0 and options.min_p > 0:
        processors.append(process.MinPLogitsWarper(options.min_p))
    return processors
