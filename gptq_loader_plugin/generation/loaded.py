"""A loaded model: generate, stream, chat, explain, close."""

from __future__ import annotations

import logging
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Self

from gptq_loader_plugin.chat.messages import check_text, drop_oldest
from gptq_loader_plugin.chat.thinking import find_marks
from gptq_loader_plugin.errors import GPTQLoaderError, PromptTooLong
from gptq_loader_plugin.generation.batch import write_alone
from gptq_loader_plugin.generation.generate import Generation, Piece, Reply, generate_pieces
from gptq_loader_plugin.generation.kv_cache import PrefixCache
from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.generation.speculation import ModelDrafter, NgramDrafter
from gptq_loader_plugin.generation.thoughts import separate_pieces, with_warning
from gptq_loader_plugin.generation.token_ids import TokenIds
from gptq_loader_plugin.kernel import Closable

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    import torch
    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.checkpoint.card import Card
    from gptq_loader_plugin.checkpoint.config import QuantConfig
    from gptq_loader_plugin.generation.engine import Engine
    from gptq_loader_plugin.generation.speculation import Drafter
    from gptq_loader_plugin.kernel import Batcher
    from gptq_loader_plugin.model.adapters import Adapters
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["LoadedModel", "WhenTooLong"]

WhenTooLong = Literal["error", "drop-oldest"]
DEFAULTS = GenerateOptions()

logger = logging.getLogger(__name__)


class LoadedModel:
    """A model ready to answer; a context manager.

    Attributes:
        model: a transformers model: `.generate()` and `pipeline()` work on it.
        tokenizer: its tokenizer.
        plan: which kernel runs which layer, and why.
        config: how the checkpoint was quantised.
        token_ids: which tokens it has.
        template: how messages become a prompt.
        card: what the model card says.
        context: the longest sequence, prompt and reply together.
        warnings: what a user should know, one sentence each.
        notes: what kernels did for the model as a whole.
        batcher: steps several sequences in one call, where a kernel can.
        engine: reads many sequences in one pass, on an accelerator.
        draft: the model whose guesses it checks; "ngram" for those that follow from what was
            written before; None for none.
        adapters: LoRA adapters that replies may be written with.
        adapter: the one for replies that name none; None for the model alone.
    """

    def __init__(  # noqa: PLR0913 - each is a part of it
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        plan: Plan,
        template: Template,
        card: Card,
        context: int,
        warnings: tuple[str, ...] = (),
        notes: tuple[str, ...] = (),
        batcher: Batcher | None = None,
        engine: Engine | None = None,
        kv_cache: Literal["int8"] | None = None,
        draft: LoadedModel | Literal["ngram"] | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.template = template
        self.card = card
        self.context = context
        self.warnings = warnings
        self.notes = notes
        self.batcher = batcher
        self.engine = engine
        self.draft = draft
        self.adapters = adapters
        self.adapter: str | None = None
        self.token_ids = TokenIds(tokenizer, model.config)
        self._cache = PrefixCache(kv_cache)
        self._closed = False

    @property
    def config(self) -> QuantConfig:
        """How the checkpoint was quantised."""
        return self.plan.config

    @cached_property
    def vocab_size(self) -> int:
        """How many tokens the model and its tokenizer both have: either may have more."""
        return min(self.token_ids.rows, len(self.tokenizer))

    def __enter__(self) -> Self:
        """Return the model itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the model."""
        self.close()

    def generate(
        self,
        prompt: str,
        options: GenerateOptions = DEFAULTS,
        *,
        cancel: threading.Event | None = None,
    ) -> Reply:
        """Complete a prompt and give the whole reply; the prompt's special tokens count.

        Raises:
            PromptTooLong: the prompt does not fit the context.
        """
        ids = self.encode(prompt)
        text, last = "", Piece("", 0)
        for last in self._pieces(ids, options, cancel=cancel, adapter=self.adapter):
            text += last.text
        return Reply(text, last.tokens, len(ids), last.finish or "stop")

    def stream(
        self,
        prompt: str,
        options: GenerateOptions = DEFAULTS,
        *,
        cancel: threading.Event | None = None,
    ) -> Iterator[Piece]:
        """Complete a prompt piece by piece; the prompt's special tokens count.

        Raises:
            PromptTooLong: the prompt does not fit the context.
        """
        return self._pieces(self.encode(prompt), options, cancel=cancel, adapter=self.adapter)

    def stream_ids(
        self,
        ids: Sequence[int],
        options: GenerateOptions = DEFAULTS,
        *,
        stop: Sequence[str] = (),
        cancel: threading.Event | None = None,
        processors: Sequence[LogitsProcessor] = (),
        watch: Callable[[int, torch.Tensor], object] | None = None,
        shown: Sequence[str] = (),
        adapter: str | None = None,
    ) -> Iterator[Piece]:
        """Complete tokens piece by piece, for a host that tokenises, masks or scores.

        Args:
            ids: the prompt's tokens, of `encode` or `encode_chat`.
            options: how to sample.
            stop: the template's end texts, where the tokens are a chat.
            cancel: ends the reply once it is set.
            processors: change the logits before a token is picked.
            watch: told each token once it is picked, and the model's own logits for it.
            shown: special tokens that are to be in the text.
            adapter: of `adapters`; None for the model alone.

        Raises:
            PromptTooLong: the tokens do not fit the context.
        """
        self.check_fits(ids)
        return self._pieces(
            ids,
            options,
            stop=stop,
            cancel=cancel,
            processors=processors,
            watch=watch,
            shown=shown,
            adapter=adapter,
        )

    def begin(
        self,
        ids: Sequence[int],
        options: GenerateOptions = DEFAULTS,
        *,
        stop: Sequence[str] = (),
        cancel: threading.Event | None = None,
        processors: Sequence[LogitsProcessor] = (),
        watch: Callable[[int, torch.Tensor], object] | None = None,
        shown: Sequence[str] = (),
        adapter: str | None = None,
    ) -> Generation:
        """Begin a reply for `Batch`, which writes several at a time; what `stream_ids` takes.

        Raises:
            PromptTooLong: the tokens do not fit the context.
        """
        self._check_open()
        self.check_fits(ids)
        if self.adapters is not None:
            self.adapters.check(adapter)
        stop_ids = self.end_ids(stop) | set(options.stop_ids)
        return Generation(
            self.model,
            self.tokenizer,
            ids,
            options,
            max_new_tokens=min(options.max_new_tokens, self.context - len(ids)),
            stop=[it for it in (*stop, *options.stop) if self.token_ids.single(it) not in stop_ids],
            stop_ids=stop_ids,
            silent_ids=self.token_ids.silent_ids(),
            shown_ids=self.token_ids.marks(shown),
            banned_ids=self.token_ids.padding_ids(),
            cancel=cancel, kept=self._cache, engine=self.engine, batcher=self.batcher,
            processors=processors, watch=watch,
            drafter=self._drafter(), path=self.plan.path, adapters=self.adapters, adapter=adapter,
        )  # fmt: skip

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: GenerateOptions = DEFAULTS,
        *,
        when_too_long: WhenTooLong = "error",
        cancel: threading.Event | None = None,
        separate_thoughts: bool = False,
    ) -> Iterator[Piece]:
        """Answer messages piece by piece; contents never become control tokens.

        Args:
            messages: mappings with `role` and `content`.
            options: how to sample.
            when_too_long: "error", or "drop-oldest" to leave out the oldest turns (never the
                system message nor the last message) with a warning on the first piece.
            cancel: ends the reply once it is set.
            separate_thoughts: whether the model's thoughts are in `Piece.thought` alone; else they
                are in the text, as the model marks them.

        Raises:
            PromptTooLong: the messages do not fit the context.
            TemplateError: there is no template, or it does not take these messages.
        """
        ids, warning = self.encode_chat(messages, when_too_long=when_too_long)
        marks = find_marks(self.template, self.tokenizer, ids) if separate_thoughts else None
        pieces = self._pieces(
            ids, options, warning, stop=self.template.stop, cancel=cancel,
            shown=marks.shown if marks else (), adapter=self.adapter,
        )  # fmt: skip
        return separate_pieces(pieces, marks) if marks else pieces

    def encode(self, prompt: str) -> list[int]:
        """Tokenise a prompt; its special tokens count.

        Raises:
            EmptyPrompt: the prompt is empty.
            PromptTooLong: the prompt does not fit the context.
            TemplateError: the prompt is no valid text.
        """
        check_text(prompt, "the prompt")
        ids: list[int] = self.tokenizer(prompt)["input_ids"]
        beginning: Any = self.tokenizer.bos_token_id
        if not ids and beginning is not None:
            ids = [int(beginning)]
        self.check_fits(ids)
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        when_too_long: WhenTooLong = "error",
        template: Template | None = None,
    ) -> tuple[list[int], str]:
        """Tokenise messages; return the ids, and a warning where turns were left out.

        Args:
            messages: mappings with `role` and `content`.
            when_too_long: as for `chat`.
            template: None for the model's own.
        """
        template = template or self.template
        kept = list(messages)
        ids: list[int] | None = None
        while ids is None:
            try:
                encoded = template.encode(kept, self.tokenizer)
                self.check_fits(encoded)
                ids = encoded
            except PromptTooLong:  # a tokenizer may refuse a text by its length
                if when_too_long == "error" or not drop_oldest(kept):
                    raise
        dropped = len(messages) - len(kept)
        if not dropped:
            return ids, ""
        warning = (
            f"the conversation no longer fits the context of {self.context} tokens: its oldest "
            f"{dropped} messages were left out"
        )
        logger.warning("%s", warning)
        return ids, warning

    def end_ids(self, stop: Sequence[str] = ()) -> frozenset[int]:
        """Collect the end tokens of the template, the generation config and the tokenizer."""
        config: Any = self.model.generation_config
        ends = config.eos_token_id if config is not None else None
        end_ids = set(ends if isinstance(ends, list) else [ends])
        end_ids.add(self.tokenizer.eos_token_id)
        end_ids.update(self.token_ids.single(text) for text in stop)
        return frozenset(
            token for token in end_ids if token is not None and token < self.token_ids.rows
        )

    def keep(self, sequences: int) -> None:
        """Keep the keys and values of so many sequences, for prompts that begin the same."""
        self._cache.max_sequences = sequences
        if self.engine is not None:
            self.engine.max_sequences = sequences

    def forget(self) -> None:
        """Free the memory of kept prefixes; the next prompts are read from their beginnings."""
        (self.engine or self._cache).clear()

    def explain(self) -> str:
        """Describe which kernel runs each kind of layer and why, and which template is used."""
        stops = ", ".join(self.template.stop) or "the tokenizer's end token"
        plan = self.plan.explain()
        notes = "".join(f"\n  {note}" for note in self.notes if note not in plan)
        return (
            f"{plan}{notes}\n  template {self.template.name} "
            f"({self.template.source}); a reply stops at {stops}"
        )

    def close(self) -> None:
        """Free the model's memory; nothing can be generated afterwards."""
        if self._closed:
            return
        self._closed = True
        self._cache.clear()
        if self.engine is not None:
            self.engine.close()
        if isinstance(self.draft, LoadedModel):
            self.draft.close()
        for module in self.model.modules():
            if isinstance(module, Closable):
                module.close()
        self.model.to("meta")  # type: ignore[arg-type]  # transformers wraps torch's to
        if self.plan.device.type in ("cuda", "rocm"):
            import torch

            torch.cuda.empty_cache()

    def check_fits(self, ids: Sequence[int]) -> None:
        """Refuse a prompt that leaves no room for a reply.

        Raises:
            EmptyPrompt: there are no tokens.
            OptionInvalid: one of them is none of the model's.
            PromptTooLong: there are more than the context takes.
        """
        self.token_ids.check(ids, self.context)

    def _pieces(
        self,
        ids: Sequence[int],
        options: GenerateOptions,
        warning: str = "",
        **more: Any,  # noqa: ANN401 - of `begin`
    ) -> Iterator[Piece]:
        self._check_open()
        begin = partial(self.begin, ids, options, **more)
        ahead = self.engine is not None and self.engine.runs_ahead
        pieces = write_alone(self, begin) if ahead else generate_pieces(begin)
        return with_warning(pieces, warning) if warning else pieces

    def _drafter(self) -> Drafter | None:
        """Make what guesses a reply's tokens."""
        if isinstance(self.draft, LoadedModel):
            return ModelDrafter(self.draft.model)
        return NgramDrafter() if self.draft == "ngram" else None

    def _check_open(self) -> None:
        if self._closed:
            raise GPTQLoaderError("this model is closed", hint="load it again")
