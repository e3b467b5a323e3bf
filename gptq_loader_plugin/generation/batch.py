"""Write several replies of one model at a time, a token of each in one step.

Continuous batching: a reply joins whenever it comes and leaves when it ends. Where a kernel steps
several sequences in one call (`Batcher`), the weights are read once for all of them; elsewhere each
sequence takes its step in turn, so that replies still come side by side. A reply is the one it
would be alone: sequences share no padding, no mask and no sum.

Where a device computes while the host goes on, its next step is begun before the host has seen the
tokens that it reads: they stay on the device, and their text is made meanwhile.
"""

from __future__ import annotations

from contextlib import nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.class_errors import raised_in_transformers
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.generation.batch_sampling import pick_tokens, to_device
from gptq_loader_plugin.generation.final_logits import final_logits
from gptq_loader_plugin.generation.top_logits import compute_logits, top_logits_head

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from gptq_loader_plugin.generation.engine import BatchedModel
    from gptq_loader_plugin.generation.generate import Generation, Piece

__all__ = ["Batch", "write_alone"]

FEW = 8  # tokens that are read beside other sequences' ones, in a step
# Of prompts in a step while replies are being written, which wait for it: what is read in so many
# seconds, by what the parts before took, and no more tokens than PART.
PART_SECONDS = 0.15
PART = 256
WHOLE = 2048  # in a step where none wait
# Positions after which a token takes twice as long to read as the first: 256 tokens of SmolLM2-135M
# took 0.31 s of one core at the beginning and 1.3 s after 8,000.
TWICE = 2048


class _PromptBudget:
    """How many tokens of prompts are read while replies wait; a token's cost grows with TWICE."""

    def __init__(self) -> None:
        self._rate: float | None = None  # cost a second

    @property
    def cost(self) -> float:
        """The cost of a step's parts: of a few tokens until it is known how long they take."""
        known = FEW if self._rate is None else self._rate * PART_SECONDS
        return min(max(known, FEW), PART)

    def saw(self, cost: float, seconds: float) -> None:
        """Learn from a part that was read; the newest ones count most."""
        rate = cost / max(seconds, 1e-6)
        self._rate = rate if self._rate is None else (self._rate + rate) / 2


class _Picked:
    """Tokens that the device has picked, on their way to the host.

    Args:
        replies: whose they are.
        tokens: int64 [replies].
    """

    def __init__(self, replies: list[Generation], tokens: torch.Tensor) -> None:
        self.replies, self.tokens = replies, tokens
        self._host, self._copied = tokens, None
        if tokens.is_cuda:  # now, as a copy waits for all that is launched before it
            self._host = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=True)
            self._host.copy_(tokens, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> list[int]:
        """Return them once they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.tolist()

    def only(self, places: list[int]) -> _Picked:
        """Leave out the others."""
        if len(places) == len(self.replies):
            return self
        at = to_device(places, torch.int64, self.tokens.device)
        return _Picked([self.replies[i] for i in places], self.tokens.index_select(0, at))


def write_alone(model: BatchedModel, begin: Callable[[], Generation]) -> Iterator[Piece]:
    """Write the reply that `begin` begins to its end, by the steps that a batch takes."""
    batch = Batch(model)
    with torch.inference_mode():
        batch.add(begin())
    try:
        while len(batch):
            for _, what in batch.step():
                if isinstance(what, Exception):
                    raise what
                yield what
    finally:
        batch.close()


class Batch:
    """Replies that are written side by side.

    Args:
        model: whose replies they are.
    """

    def __init__(self, model: BatchedModel) -> None:
        self._model: Any = model.model
        self._batcher, self._engine = model.batcher, model.engine
        self._adapters = model.adapters
        self._head = top_logits_head(self._model)
        self._written: list[Generation] = []
        self._picked: _Picked | None = None
        self._prompts = _PromptBudget()

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
        self._picked = None

    @torch.inference_mode()
    def step(self) -> Iterator[tuple[Generation, Piece | Exception]]:
        """Read some of the prompts, first come first, and a token of every reply whose prompt was.

        Gives each reply's new piece, where it has one; or what went wrong with it, which ends it
        and no other.
        """
        for generation in list(self._written):
            if (piece := generation.cancelled()) is not None:
                yield self._emit(generation, piece)
        picked, self._picked = self._picked, None
        if picked is not None:
            following = self._run_ahead(picked)
            yield from self._see(picked, following)
            if following is not None:
                return
        long = [generation for generation in self._written if len(generation.pending) > FEW]
        few = [generation for generation in self._written if len(generation.pending) <= FEW]
        yield from self._step_adapted(few)
        yield from self._read_prompts(long, waiting=bool(few))
        try:
            states = self._step_many(few)
        except Exception as error:  # noqa: BLE001 - the caller's to tell: memory may be short
            for generation in few:
                yield self._emit(generation, generation.refusal(error) or error)
            return
        if states is not None and self._takes_turns(few):
            self._picked = _Picked(few, self._pick(few, states[:, 0]))
            return
        seen = {} if states is None else self._pick_seen(few, states)
        for i, generation in enumerate(few):
            if states is None:
                yield from self._forward(generation, FEW)
            else:
                yield from self._sample(generation, states[i], seen.get(i))

    def _read_prompts(
        self, long: list[Generation], *, waiting: bool
    ) -> Iterator[tuple[Generation, Piece | Exception]]:
        """Read some of the prompts; less of them while other replies wait."""
        left: float = self._prompts.cost if waiting else WHOLE
        for generation in long:
            cost = 1 + generation.position / TWICE
            if left > 0:
                count = min(max(int(left / cost if waiting else left), 1), len(generation.pending))
                left -= count * (cost if waiting else 1)
                began = perf_counter()
                seen = list(self._forward(generation, count))
                if waiting:
                    self._prompts.saw(count * cost, perf_counter() - began)
                yield from seen

    def _step_adapted(
        self, few: list[Generation]
    ) -> Iterator[tuple[Generation, Piece | Exception]]:
        """Step replies with an adapter by themselves, of which a batcher knows nothing."""
        if self._engine is None:
            for generation in [it for it in few if it.adapter is not None]:
                few.remove(generation)
                yield from self._forward(generation, FEW)

    def _takes_turns(self, few: list[Generation]) -> bool:
        """Return whether the next step may begin before the tokens of this one are seen."""
        return (
            self._engine is not None
            and self._engine.runs_ahead
            and bool(few)
            and len(few) == len(self._written)
            and all(it.runs_ahead for it in few)
        )

    def _run_ahead(self, picked: _Picked) -> _Picked | None:
        """Begin the step that reads picked tokens; return those that it picks.

        None where there is something else to do first, or no room.
        """
        assert self._engine is not None
        replies = picked.replies
        if replies != self._written or all(it.ends_next for it in replies):
            return None
        try:
            logits = self._engine.step_ahead(picked.tokens, [it.cache for it in replies])
        except Exception as error:
            if isinstance(error, GPTQLoaderError) or raised_in_transformers(error):
                return None  # a step that knows its tokens says so, of its replies
            raise
        return _Picked(replies, self._pick(replies, logits, uncounted=1))

    def _see(
        self, picked: _Picked, following: _Picked | None
    ) -> list[tuple[Generation, Piece | Exception]]:
        """Wait for tokens that were picked; a step that has begun goes on with those unfinished."""
        assert self._engine is not None
        pieces, left = [], []
        for i, (generation, token) in enumerate(zip(picked.replies, picked.wait(), strict=True)):
            if generation.finished:  # cancelled meanwhile
                continue
            piece = generation.append_token(token, None)
            if piece is not None:
                pieces.append(self._emit(generation, piece))
            if following is not None and not generation.finished:
                generation.pending = []
                self._engine.append([token], [generation.cache])
                left.append(i)
        if following is not None and left:
            self._picked = following.only(left)
        return pieces

    def _step_many(self, few: list[Generation]) -> torch.Tensor | None:
        """Read what is unread of some replies in one step: logits [replies, 1, vocabulary]."""
        tokens = [generation.pending for generation in few]
        if self._engine is not None and few:
            caches, lengths = [it.cache for it in few], [it.length for it in few]
            with self._adapted(few):
                adapted = any(it.adapter is not None for it in few)
                logits = self._engine.step(tokens, caches, lengths, eager=adapted)
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
        return final_logits(self._model, states)[:, None]

    def _adapted(self, few: list[Generation]) -> AbstractContextManager[None]:
        """Run the model with the adapters of some replies, each its own."""
        if self._adapters is None:
            return nullcontext()
        return self._adapters.applied([it.adapter for it in few], [len(it.pending) for it in few])

    def _pick_seen(self, few: list[Generation], logits: torch.Tensor) -> dict[int, int]:
        """Pick at a time the tokens of those replies that can be, by their place."""
        rows = [i for i, it in enumerate(few) if it.row is not None]
        if not rows:
            return {}
        some = logits[:, 0] if len(rows) == len(few) else logits[rows, 0]
        picked = self._pick([few[i] for i in rows], some)
        return dict(zip(rows, picked.tolist(), strict=True))

    def _pick(
        self, replies: list[Generation], logits: torch.Tensor, uncounted: int = 0
    ) -> torch.Tensor:
        """Pick a token of each reply on the device, from logits [replies, vocabulary]."""
        rows = [it.row for it in replies if it.row is not None]
        return pick_tokens(rows, [it.sequence for it in replies], logits, uncounted=uncounted)

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
