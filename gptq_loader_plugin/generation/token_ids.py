"""Which tokens a model and its tokenizer have, and which of them stand for a text alone."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.chat.templates import CHATML_START
from gptq_loader_plugin.errors import EmptyPrompt, OptionInvalid, PromptTooLong

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

__all__ = ["TokenIds"]


class TokenIds:
    """The tokens of a model and its tokenizer; either may have more than the other.

    Args:
        tokenizer: the tokenizer.
        config: the model's config.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
        self._tokenizer: Any = tokenizer
        self._config = config

    def single(self, text: str) -> int | None:
        """Find the one token that is `text`; None where it takes several."""
        index = self._vocabulary.get(text) if text.startswith(("<", "[")) else None
        return int(index) if index is not None and index < self.rows else None

    @cached_property
    def rows(self) -> int:
        """How many tokens the model's embedding has."""
        return int(self._config.get_text_config().vocab_size)

    def silent_ids(self) -> frozenset[int]:
        """Collect the tokens that are never shown."""
        start = self.single(CHATML_START)
        return frozenset(() if start is None else (start,))

    def marks(self, texts: Sequence[str]) -> frozenset[int]:
        """Collect the tokens that are one of the texts each."""
        ids = (self._vocabulary.get(text) for text in texts)
        return frozenset(index for index in ids if index is not None)

    def padding_ids(self) -> range:
        """List the ids past the tokenizer that only pad the embedding."""
        known = max(self._vocabulary.values(), default=-1) + 1
        return range(known, int(self._config.get_text_config().vocab_size))

    def check(self, ids: Sequence[int], context: int) -> None:
        """Refuse a prompt that leaves no room for a reply.

        Raises:
            EmptyPrompt: there are no tokens.
            OptionInvalid: one of them is none of the model's.
            PromptTooLong: there are more than the context takes.
        """
        if not ids:
            raise EmptyPrompt("the prompt is empty", hint="write something")
        if len(ids) >= context:
            raise PromptTooLong(
                f"the prompt has {len(ids):,} tokens, and the context is {context:,}",
                tokens=len(ids),
                context=context,
                hint="shorten it; a chat can drop its oldest turns: when_too_long='drop-oldest'",
            )
        beyond = next((index for index in ids if not 0 <= index < self.rows), None)
        if beyond is not None:
            token: Any = self._tokenizer.convert_ids_to_tokens(beyond) if beyond >= 0 else None
            raise OptionInvalid(
                f"the prompt has {token or 'a token'} (id {beyond}), and the model knows the ids 0 "
                f"to {self.rows - 1}",
                hint="leave it out: the tokenizer has tokens that this model does not",
            )

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        """The tokenizer's, once: it takes 20 ms to list."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        return vocabulary
