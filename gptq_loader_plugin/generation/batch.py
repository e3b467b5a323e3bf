"""Write several replies of one model at a time, a token of each in one step.

Continuous batching: a reply joins whenever it comes and leaves when it ends. Where a kernel steps
several sequences in one call (`Batcher`), the weights are read once for all of them; elsewhere each
sequence takes its step in turn, so that replies still come side by side. A reply is the one it
would be alone: sequences share no padding, no mask and no sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.generation.batch_sampling import pick_tokens
from gptq_loader_plugin.generation.generate import compute_logits, top_logits_head

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.generation.generate import Generation, Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["Batch"]

FEW = 8  # tokens that are read beside other sequences' ones, in a step
# Of prompts in a step while replies are being written, which wait for it: SmolLM2-135M reads so
# many in the time of three steps of 16 sequences, larger models in less.
PART = 256
WHOLE = 2048  # in a step where none wait
# Positions after which a token takes twice as long to read as the first: 256 tokens of SmolLM2-135M
# took 0.31 s of one core at the beginning and 1.3 s after 8,000.
TWICE = 2048


class Batch:
    """Replies that are written side by side.

    Args:
        model: whose replies they are.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model: Any = model.model
        self._batcher, self._engine = model.batcher, model.engine
        self._head = top_logits_head(self._model)
        self._written: list[Generation] = []

    def __len__(self) -> int:
        """Count the replies that are being written."""
        return len(self._written)

    def add(self, generation: Generation) -> None:
        """Take on a reply, of `LoadedModel.begin`."""
        self._written.append(generation)

    def close(self) -> None:
        """End all replies where they are."""
        for generation in self._written:
            generation.close()
        self._written.clear()

    @torch.inference_mode()
    def step(self) -> Iterator[tuple[Generation, Piece | Exception]]:
        """Read some of the prompts, first come first, and a token of every reply whose prompt was.

        Gives each reply's new piece, where it has one; or what went wrong with it, which ends it
        and no other.
        """
        for generation in list(self._written):
            if (piece := generation.cancelled()) is not None:
                yield self._emit(generation, piece)
        long = [generation for generation in self._written if len(generation.pending) > FEW]
        few = [generation for generation in self._written if len(generation.pending) <= FEW]
        left: float = PART if few else WHOLE
        for generation in long:
            cost = 1 + generation.position / TWICE if few else 1
            if left > 0:
                count = min(max(int(left / cost), 1), len(generation.pending))
                left -= count * cost
                yield from self._forward(generation, count)
        try:
            states = self._step_many(few)
        except Exception as error:  # noqa: BLE001 - the caller's to tell: memory may be short
            for generation in few:
                yield self._emit(generation, error)
            return
        picked = {} if states is None else self._pick(few, states)
        for i, generation in enumerate(few):
            if states is None:
                yield from self._forward(generation, FEW)
            else:
                yield from self._sample(generation, states[i], picked.get(i))

    def _step_many(self, few: list[Generation]) -> torch.Tensor | None:
        """Read what is unread of some replies in one step: logits [replies, 1, vocabulary]."""
        tokens = [generation.pending for generation in few]
        if self._engine is not None and few:
            caches, lengths = [it.cache for it in few], [it.length for it in few]
            logits = self._engine.step(tokens, caches, lengths)
            for generation in few:
                generation.pending = []
            return logits[:, None]
        if self._batcher is None or len(few) < 2:
            return None
        states = self._batcher.step_many(tokens, [generation.cache for generation in few])
        if states is None:
            return None
        for generation in few:
            generation.pending = []
        counts = torch.tensor([len(token) for token in tokens], device=states.device)
        last = counts.cumsum(0) - 1
        states = states[last]
        if self._head is not None:
            return compute_logits(self._head, few, states)[:, None]
        of_all: torch.Tensor = self._model.get_output_embeddings()(states)
        return of_all[:, None]

    def _pick(self, few: list[Generation], logits: torch.Tensor) -> dict[int, int]:
        """Pick at a time the tokens of those replies that can be, by their place."""
        rows = {i: it.row for i, it in enumerate(few) if it.row is not None}
        if not rows:
            return {}
        some = logits[:, 0] if len(rows) == len(few) else logits[list(rows), 0]
        picked = pick_tokens(list(rows.values()), [few[i].sequence for i in rows], some)
        return dict(zip(rows, picked.tolist(), strict=True))

    def _forward(
        self, generation: Generation, max_tokens: int
    ) -> Iterator[tuple[Generation, Piece | Exception]]:
        try:
            logits = generation.forward_chunk(max_tokens)
        except Exception as error:  # noqa: BLE001 - the caller's to tell; the others go on
            yield self._emit(generation, error)
            return
        if not generation.pending:
            yield from self._sample(generation, logits)

    def _sample(
        self, generation: Generation, logits: torch.Tensor, picked: int | None = None
    ) -> Iterator[tuple[Generation, Piece | Exception]]:
        try:
            piece = (
                generation.sample(logits)
                if picked is None
                else generation.append_token(picked, logits)
            )
        except Exception as error:  # noqa: BLE001 - a caller's processor may fail
            yield self._emit(generation, error)
            return
        if piece is not None:
            yield self._emit(generation, piece)

    def _emit(
        self, generation: Generation, what: Piece | Exception
    ) -> tuple[Generation, Piece | Exception]:
        if isinstance(what, Exception) or generation.finished:
            self._written.remove(generation)
            generation.close()
        return generation, what
