"""Generate tokens one at a time and give them out as text, as soon as the text is certain.

A piece of text is held back while it could still be the beginning of a stop text or of an
unfinished character.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Literal

import torch

from gptq_loader_plugin.class_errors import class_error
from gptq_loader_plugin.generation.batch_sampling import Row, pick_tokens
from gptq_loader_plugin.generation.kv_cache import PrefixCache
from gptq_loader_plugin.generation.model_runner import ModelRunner
from gptq_loader_plugin.generation.sampling import Sampler
from gptq_loader_plugin.generation.speculation import Pace, can_crop, crop
from gptq_loader_plugin.generation.text_stream import TextStream
from gptq_loader_plugin.generation.top_logits import compute_logits, top_logits_head

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from gptq_loader_plugin.errors import GPTQLoaderError
    from gptq_loader_plugin.generation.engine import Engine
    from gptq_loader_plugin.generation.options import GenerateOptions
    from gptq_loader_plugin.generation.speculation import Drafter
    from gptq_loader_plugin.kernel import Batcher
    from gptq_loader_plugin.model.adapters import Adapters

__all__ = [
    "Finish",
    "Generation",
    "Piece",
    "Reply",
    "generate_pieces",
]

Finish = Literal["stop", "length", "cancelled"]
PREFILL_TOKENS = 2048  # a prompt is read in parts of this length, to bound attention's memory


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a reply.

    Attributes:
        text: the new text; may be empty.
        tokens: how many tokens have been generated so far.
        finish: why the reply ended, on its last piece; None before.
        warning: what a user should know about this reply, or "".
        stop_text: the text that ended the reply, on its last piece, where one did.
        thought: new text of the model's thoughts, where those are separated.
    """

    text: str
    tokens: int
    finish: Finish | None = None
    warning: str = ""
    stop_text: str = ""
    thought: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole reply.

    Attributes:
        text: all of its text.
        tokens: how many tokens were generated.
        prompt_tokens: how many tokens the prompt has.
        finish: why it ended.
    """

    text: str
    tokens: int
    prompt_tokens: int
    finish: Finish


@torch.inference_mode()
def generate_pieces(begin: Callable[[], Generation]) -> Iterator[Piece]:
    """Write the reply that `begin` begins to its end, piece by piece."""
    generation = begin()
    try:
        while not generation.finished:
            logits = generation.forward_pending()
            piece = generation.cancelled() or generation.sample(logits)
            if piece is not None:
                yield piece
    finally:
        generation.close()


class Generation:
    """One reply as it is written: until a stop token, a stop text, the length or a cancellation.

    `forward_pending` runs the model over the pending tokens, a prompt's or the last one, and
    `sample` picks the token that follows. `Batch`, which writes several replies, runs them itself.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        ids: the prompt's tokens.
        options: how to sample.
        max_new_tokens: the ceiling, already cut to the context.
        stop: texts that end the reply; they are not part of it.
        stop_ids: tokens that end the reply.
        silent_ids: tokens that are never shown.
        shown_ids: tokens that are, though the tokenizer calls them special.
        banned_ids: tokens that are never sampled: the embedding's padding.
        cancel: ends the reply once it is set.
        kept: the caches of replies before this one; tokens one of them holds are not read again.
        engine: reads the tokens, in place of the model itself.
        batcher: the model's, where its kernel steps it.
        processors: change the logits before a token is picked, after those that `options` ask for.
        watch: told each token once it is picked, an end token too, and the model's own logits for
            it [1, vocabulary].
        drafter: guesses tokens, which are read beside the last one and kept where they are picked.
        path: the checkpoint, named where the model's class fails; None leaves its error as it is.
        adapters: the model's.
        adapter: the one that this reply is written with; None for the model alone.

    Attributes:
        cache: keys and values of what was read.
        pending: the tokens to read next.
        finished: whether the reply has ended.
    """

    def __init__(  # noqa: PLR0913 - each is something a caller may need
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        ids: Sequence[int],
        options: GenerateOptions,
        *,
        max_new_tokens: int,
        stop: Sequence[str],
        stop_ids: frozenset[int],
        silent_ids: frozenset[int] = frozenset(),
        shown_ids: frozenset[int] = frozenset(),
        banned_ids: Sequence[int] = (),
        cancel: threading.Event | None = None,
        kept: PrefixCache | None = None,
        engine: Engine | None = None,
        batcher: Batcher | None = None,
        processors: Sequence[LogitsProcessor] = (),
        watch: Callable[[int, torch.Tensor], object] | None = None,
        drafter: Drafter | None = None,
        path: Path | None = None,
        adapters: Adapters | None = None,
        adapter: str | None = None,
    ) -> None:
        if not ids:
            raise ValueError("an empty prompt")
        self._model = model
        # Of an adapter a batcher knows nothing.
        self._runner = ModelRunner(model, batcher if adapter is None else None)
        self._engine = engine
        whole = engine is not None or (adapters is not None and adapters.changes_head(adapter))
        self._head = None if whole else top_logits_head(model)
        self._text = TextStream(tokenizer, stop, silent_ids, shown_ids)
        self._sampler = Sampler(options, banned_ids, model.device, processors)
        self.row: Row | None = None  # how its token is picked beside others'
        if engine is not None and not processors:
            self.row = Row.of(
                options, banned_ids, model.config.get_text_config().vocab_size, model.device
            )
        self._max_new_tokens, self._stop_ids = max_new_tokens, stop_ids
        self._cancel, self._watch, self._path = cancel, watch, path
        self.adapter, self._adapters = adapter, adapters
        self._adapter_number = () if adapters is None else adapters.number(adapter)
        kept = kept if self._runner.keeps_prefixes else None
        self._kept: PrefixCache | Engine = engine or kept or PrefixCache()
        self._read = list(ids)  # whose keys and values the cache has, or will have once it is used
        self._sequence = torch.tensor([self._read], device=model.device)
        self._tokens = 0
        self._rotation = self._runner.rotation.of(len(self._read))
        self.cache, held = self._kept.reuse(model, ids, self._kept_by)
        self.pending = self._read[held:]
        self.finished = False
        self._pace, self._guesses = Pace(), list[int]()
        self._began: float | None = None  # of the step whose token is to be picked
        # A penalty goes by every token before; a rotation, by how many there are.
        guessing = (
            engine is None
            and options.repetition_penalty == 1
            and self._runner.takes_parts
            and not self._runner.rotation.varies
            and can_crop(self.cache)
        )
        self._drafter = drafter if guessing else None

    def forward_pending(self, max_tokens: int = PREFILL_TOKENS) -> torch.Tensor:
        """Run the model over all pending tokens, so many at a time: logits [1, vocabulary]."""
        while True:
            logits = self.forward_chunk(max_tokens)
            if not self.pending:
                return logits

    def forward_chunk(self, max_tokens: int) -> torch.Tensor:
        """Run the model over some pending tokens; return the logits after them [1, vocabulary].

        Over all of them, where the model takes no parts of a prompt; beside the last one over
        guesses too, where there are any, with a row of logits after each.

        Raises:
            UnsupportedFormat: the model's class fails.
        """
        try:
            return self._forward_chunk(max_tokens)
        except Exception as error:
            refusal = self.refusal(error)
            if refusal is None:
                raise
            raise refusal from error

    def refusal(self, error: Exception) -> GPTQLoaderError | None:
        """Return what to say of an error that the model's class raised; None of another's."""
        if self._path is None:
            return None
        return class_error(error, self._model.config.model_type, self._path)

    def _forward_chunk(self, max_tokens: int) -> torch.Tensor:
        length, past = len(self._read), self.position
        if self._engine is not None:
            part, self.pending = self.pending[:max_tokens], self.pending[max_tokens:]
            with self._adapted(len(part)):
                return self._engine.step(
                    [part], [self.cache], [length], eager=self.adapter is not None
                )
        count = max_tokens if self._runner.takes_parts else len(self.pending)
        part, self.pending = self.pending[:count], self.pending[count:]
        self._guess(part)
        rows = 1 + len(self._guesses)
        with self._adapted(len(part) + len(self._guesses)):
            output, self.cache = self._runner.run(
                [*part, *self._guesses],
                self.cache,
                past=past,
                length=length + len(self._guesses),
                states=self._head is not None,
                logits_to_keep=rows,
            )
        if self._head is not None:
            return compute_logits(self._head, [self] * rows, output[0, -rows:])
        return output[0, -rows:]

    def _adapted(self, tokens: int) -> AbstractContextManager[None]:
        """Run the model with this reply's adapter, over so many tokens."""
        if self._adapters is None:
            return nullcontext()
        return self._adapters.applied([self.adapter], [tokens])

    @property
    def _kept_by(self) -> tuple[int, ...]:
        """What kept keys and values must be alike in: the rotation and the adapter."""
        return (*self._rotation, *self._adapter_number)

    def _guess(self, part: Sequence[int]) -> None:
        """Guess what follows the last token, where that pays."""
        self._guesses, self._began = [], None
        if self._drafter is None or len(part) != 1 or self.pending:
            return
        self._began = perf_counter()
        room = self._max_new_tokens - self._tokens - 1
        if (count := min(self._pace.choose(), room)) > 0:
            self._guesses = self._drafter.propose(self._read, count)

    @property
    def runs_ahead(self) -> bool:
        """Whether the token after the next one is picked by nothing but logits and a draw."""
        return (
            self.row is not None
            and self.adapter is None
            and self._watch is None
            and self.row.options.repetition_penalty == 1
            and not self._runner.rereads
        )

    @property
    def num_tokens(self) -> int:
        """How many tokens were picked."""
        return self._tokens

    @property
    def ends_next(self) -> bool:
        """Whether the next token is the last one, whichever it is."""
        return self._tokens + 1 >= self._max_new_tokens

    @property
    def position(self) -> int:
        """How many tokens have been read."""
        return self.length - len(self.pending)

    @property
    def length(self) -> int:
        """How many tokens there are, those that are pending included."""
        return len(self._read)

    @property
    def sequence(self) -> torch.Tensor:
        """All tokens, int64 [1, n]; the prompt's, where picking one goes by no others."""
        new = self._read[self._sequence.shape[1] :] if self._sampler.reads_sequence else []
        if new:
            step = torch.tensor([new], device=self._sequence.device)
            self._sequence = torch.cat((self._sequence, step), dim=1)
        return self._sequence

    def needed_logits(self) -> int:
        """Return how many of the top logits `sample` needs; 0 where it needs all of them."""
        return 0 if self._watch is not None else self._sampler.needed_logits()

    def excluded(self, vocabulary: int) -> torch.Tensor | None:
        """Mark the tokens that do not count among those needed: bool [vocabulary]."""
        return self._sampler.excluded(self.sequence, vocabulary)

    def cancelled(self) -> Piece | None:
        """Return the last piece where the reply was cancelled."""
        if self._cancel is None or not self._cancel.is_set():
            return None
        return self._end(self._text.rest(), "cancelled")

    def sample(self, logits: torch.Tensor) -> Piece | None:
        """Pick the token that follows what was read; return the text that is certain with it."""
        if self.row is not None:
            return self.append_token(int(pick_tokens([self.row], [self.sequence], logits)), logits)
        if self._drafter is not None:
            return self._sample_guessed(logits)
        return self.append_token(self._sampler.sample(self.sequence, logits), logits)

    def _sample_guessed(self, logits: torch.Tensor) -> Piece | None:
        """Pick tokens by a row of logits each, as long as they are those that were guessed."""
        guesses, self._guesses = self._guesses, []
        text, kept, piece = "", 0, None
        for row in logits.split(1):
            piece = self.append_token(self._sampler.sample(self.sequence, row), row)
            text += "" if piece is None else piece.text
            if self.finished or kept == len(guesses) or self.pending != [guesses[kept]]:
                break
            self.pending = []  # its keys and values are there
            kept += 1
        if self._began is not None:
            self._pace.note(len(guesses), kept, perf_counter() - self._began)
            self._began = None
        if guesses:
            crop(self.cache, self.position)
        if piece is not None and piece.finish is not None:
            return replace(piece, text=text)
        return Piece(text, self._tokens) if text else None

    def append_token(self, token: int, logits: torch.Tensor | None) -> Piece | None:
        """Go on with a token that was picked by `logits`; return the text that is certain now.

        Nobody who `runs_ahead` looks at the logits.
        """
        self._tokens += 1
        if self.row is not None:
            self.row.num_sampled += 1
        if self._watch is not None and logits is not None:
            self._watch(token, logits)
        if token in self._stop_ids:
            return self._end(self._text.rest(), "stop")
        new = self._text.add(token)
        if self._text.stopped:
            return self._end(new, "stop")
        if self._tokens == self._max_new_tokens:
            return self._end(new + self._text.rest(), "length")
        self.pending = [token]
        self._read.append(token)
        rotation = self._runner.rotation.of(len(self._read))
        if self._runner.rereads or rotation != self._rotation:
            self._rotation = rotation
            self.cache = self._kept.make(self._model, self._kept_by)
            self.pending = list(self._read)
        return Piece(new, self._tokens) if new else None

    def close(self) -> None:
        """End the reply, where it has not ended, and keep its cache for the next one."""
        self.finished = True
        self._kept.store(self._read, self.cache, self._kept_by)

    def _end(self, text: str, finish: Finish) -> Piece:
        self.finished = True
        return Piece(text, self._tokens, finish, stop_text=self._text.stop_text)
