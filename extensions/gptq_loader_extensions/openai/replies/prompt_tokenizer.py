"""Refuse texts that cannot fit a model's context by their length, before they are tokenised.

A token stands for so many characters at most. Where that is so of every text, which it is of
tokenizers of bytes, a text of more characters than the context's tokens have needs no tokenizer.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.replies.structured import grammar_tokenizer
from gptq_loader_plugin.errors import PromptTooLong

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["PROMPT_THREADS", "PromptTokenizer", "encode_end", "prompt_models", "prompt_tokenizer"]

PROMPT_THREADS = 2  # one for small requests, one for any
COMPOSED = 4  # characters that NFC makes one of, at most
# How many characters a normalizer may make one of; any that is not here may leave text out.
NORMALIZERS = {"NFC": COMPOSED, "NFKC": COMPOSED} | dict.fromkeys(
    ("ByteLevel", "Lowercase", "NFD", "NFKD", "Prepend"), 1
)
# Those that keep all of a text, where they do not say that they remove what they split it at.
PRE_TOKENIZERS = frozenset({"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split"})


class PromptTokenizer:
    """A tokenizer of one thread's own, which refuses texts that cannot fit.

    Tokenizers keep the options of a call inside them: two threads cannot share one.

    Args:
        tokenizer: the model's, or a copy of it.
        context: how many tokens the model takes.
        grammar: the same tokenizer as llguidance has it, where it does.

    Attributes:
        tokenizer: refuses nothing.
        grammar: as above.
        longest_token: the characters that a token stands for, at most; None where there is no such
            number.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        grammar: Any = None,  # noqa: ANN401 - llguidance's
    ) -> None:
        self.tokenizer = tokenizer
        self.grammar = grammar
        self.longest_token = _longest_token(tokenizer)
        self._context = context
        self._left_out = _left_out(tokenizer)
        self._drops_spaces = any(
            token.lstrip or token.rstrip for token in tokenizer.added_tokens_decoder.values()
        )

    def __call__(self, text: str | Sequence[str], **options: Any) -> Any:  # noqa: ANN401 - transformers'
        """Tokenise a text, or the parts of one.

        Raises:
            PromptTooLong: it cannot fit.
        """
        self.check_length(text)
        return self.tokenizer(text if isinstance(text, str) else list(text), **options)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - the tokenizer's
        """Return what the tokenizer has."""
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        """Count the tokens of the vocabulary."""
        return len(self.tokenizer)

    def check_length(self, text: str | Sequence[str]) -> None:
        """Refuse a text, or the parts of one, that cannot fit.

        Raises:
            PromptTooLong: there are more characters than the context's tokens have.
        """
        if self.longest_token is None:
            return
        limit = self._context * self.longest_token
        parts = [text] if isinstance(text, str) else text
        if sum(map(len, parts)) <= limit:
            return
        length = sum(map(self._count, parts))
        if length > limit:
            tokens = -(-length // self.longest_token)
            raise PromptTooLong(
                f"the prompt has {length:,} characters, which are {tokens:,} tokens or more, and "
                f"the context is {self._context:,}",
                tokens=tokens,
                context=self._context,
                exact=False,
                hint="shorten it",
            )

    def _count(self, text: str) -> int:
        """Count the characters that are surely in tokens."""
        dropped = sum(map(text.count, self._left_out))
        if not self._drops_spaces:
            return len(text) - dropped
        return sum(map(len, text.split())) - dropped

    def end_of(self, text: str, tokens: int) -> str:
        """Return the end of a text, where that surely has so many tokens."""
        if self.longest_token is None:
            return text
        enough = (tokens + 1) * self.longest_token
        end = text[-2 * enough :]  # twice: where a text is cut, its tokens are others
        return end if self._count(end) > enough else text


def prompt_models(model: LoadedModel) -> tuple[LoadedModel, ...]:
    """Return a model as often as there are threads that make prompts, each with its own tokenizer.

    All else is the model's own, of which these threads may run nothing.
    """
    grammar = grammar_tokenizer(model)
    models = []
    for _ in range(PROMPT_THREADS):
        one = copy.copy(model)
        tokenizer: Any = PromptTokenizer(copy.deepcopy(model.tokenizer), model.context, grammar)
        one.tokenizer = tokenizer
        models.append(one)
    return tuple(models)


def prompt_tokenizer(model: LoadedModel) -> PromptTokenizer:
    """Return the tokenizer of one of `prompt_models`."""
    tokenizer: Any = model.tokenizer
    assert isinstance(tokenizer, PromptTokenizer), "this is the model that the engine's thread runs"
    return tokenizer


def encode_end(
    model: LoadedModel, text: str, tokens: int, *, add_special_tokens: bool = True
) -> list[int]:
    """Tokenise a text of which the last tokens alone may be needed.

    Args:
        model: one of `prompt_models`.
        text: of any length.
        tokens: how many are needed.
        add_special_tokens: whether to put the tokenizer's beginning-of-text token first.
    """
    tokenizer = prompt_tokenizer(model)
    whole: Any = tokenizer.tokenizer
    ids: list[int] = whole(
        tokenizer.end_of(text, tokens), add_special_tokens=add_special_tokens, verbose=False
    )["input_ids"]
    return ids


def _longest_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the characters that a token stands for, at most, where no text has fewer tokens."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    vocabulary = tokenizer.get_vocab()
    composed = _composed(_state(backend.normalizer))
    kept = _keeps_all(_state(backend.pre_tokenizer))
    if not composed or not kept or not _has_all_bytes(backend, vocabulary):
        return None
    return composed * max(map(len, vocabulary))


def _has_all_bytes(backend: Any, vocabulary: dict[str, int]) -> bool:  # noqa: ANN401 - tokenizers'
    """Return whether every character is in tokens, but for those that `_left_out` lists.

    A character of several bytes is in one at least where all bytes are that may follow a first.
    """
    if getattr(backend.model, "byte_fallback", False):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    states = (_state(backend.pre_tokenizer), _state(backend.normalizer))
    in_bytes = any("ByteLevel" in json.dumps(state) for state in states)
    return in_bytes and all(_letters()[byte] in vocabulary for byte in range(0x80, 0xC0))


def _left_out(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """List the characters of one byte that a tokenizer of bytes has no token for.

    SmolLM2's has none for U+0004: a text of them has no tokens.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or getattr(backend.model, "byte_fallback", False):
        return ()
    vocabulary = tokenizer.get_vocab()
    return tuple(chr(byte) for byte in range(0x80) if _letters()[byte] not in vocabulary)


def _letters() -> dict[int, str]:
    """Return the letters that stand for bytes in vocabularies."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()
    return letters


def _state(part: Any) -> dict[str, Any] | None:  # noqa: ANN401 - tokenizers'
    """Return what a tokenizer.json says of a part of the tokenizer."""
    if part is None:
        return None
    state: dict[str, Any] = json.loads(part.__getstate__())
    return state


def _composed(normalizer: dict[str, Any] | None) -> int:
    """Return how many characters a normalizer may make one of; 0 where it may leave any out."""
    if normalizer is None:
        return 1
    if normalizer["type"] == "Sequence":
        product = 1
        for one in normalizer["normalizers"]:
            product *= _composed(one)
        return product
    if normalizer["type"] == "Replace":
        old, new = normalizer["pattern"].get("String", ""), normalizer["content"]
        return -(-len(old) // len(new)) if old and new else 0
    return NORMALIZERS.get(normalizer["type"], 0)


def _keeps_all(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Return whether a pre-tokenizer leaves nothing of a text out."""
    if pre_tokenizer is None:
        return True
    if pre_tokenizer["type"] == "Sequence":
        return all(map(_keeps_all, pre_tokenizer["pretokenizers"]))
    removes = pre_tokenizer.get("behavior") == "Removed"
    return pre_tokenizer["type"] in PRE_TOKENIZERS and not removes
