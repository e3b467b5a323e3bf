"""Generate tokens one at a time and give them out as text, as soon as the text is certain.

A piece of text is held back while it could still be the beginning of a stop text or of an
unfinished character.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch

from gptq_loader_plugin.kv_cache import KeptCache
from gptq_loader_plugin.sampling import Sampler

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

    from gptq_loader_plugin.options import GenerateOptions

__all__ = ["Finish", "Piece", "Reply", "generate_pieces"]

Finish = Literal["stop", "length", "cancelled"]
UNFINISHED = "\ufffd"  # what a tokenizer gives for the first bytes of a character
PREFILL_TOKENS = 2048  # a prompt is read in parts of this length, to bound attention's memory


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a reply.

    Attributes:
        text: the new text; may be empty.
        tokens: how many tokens have been generated so far.
        finish: why the reply ended, on its last piece; None before.
        warning: what a user should know about this reply, or "".
    """

    text: str
    tokens: int
    finish: Finish | None = None
    warning: str = ""


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
def generate_pieces(  # noqa: PLR0913 - each is something a caller may need
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    options: GenerateOptions,
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    stop_ids: frozenset[int],
    hidden_ids: frozenset[int] = frozenset(),
    never_ids: Sequence[int] = (),
    cancel: threading.Event | None = None,
    kept: KeptCache | None = None,
    processors: Sequence[LogitsProcessor] = (),
    watch: Callable[[int, torch.Tensor], object] | None = None,
) -> Iterator[Piece]:
    """Generate until a stop token, a stop text, the length or a cancellation.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        ids: the prompt's tokens.
        options: how to sample.
        max_new_tokens: the ceiling, already cut to the context.
        stop: texts that end the reply; they are not part of it.
        stop_ids: tokens that end the reply.
        hidden_ids: tokens that are never shown.
        never_ids: tokens that are never sampled: the embedding's padding.
        cancel: ends the reply once it is set.
        kept: the cache of the reply before this one; tokens it holds are not read again.
        processors: change the logits before a token is picked, after those that `options` ask for.
        watch: told each token once it is picked, an end token too, and the model's own logits for
            it [1, vocabulary].
    """
    text = TextStream(tokenizer, stop, hidden_ids)
    sampler = Sampler(options, never_ids, model.device, processors)
    kept = kept or KeptCache()
    cache, held = kept.take(model, ids)
    read = list(ids)  # whose keys and values the cache has, or will have once it is used
    try:
        sequence = torch.tensor([read], device=model.device)
        cached = {_cache_name(model): cache, "use_cache": True}
        logits = _prefill(model, sequence[:, held:], cached)
        for count in range(1, max_new_tokens + 1):
            if cancel is not None and cancel.is_set():
                yield Piece(text.rest(), count - 1, "cancelled")
                return
            token = sampler.pick(sequence, logits)
            if watch is not None:
                watch(token, logits)
            if token in stop_ids:
                yield Piece(text.rest(), count, "stop")
                return
            new = text.add(token)
            if text.stopped:
                yield Piece(new, count, "stop")
                return
            if count == max_new_tokens:
                yield Piece(new + text.rest(), count, "length")
                return
            if new:
                yield Piece(new, count)
            read.append(token)
            step = torch.tensor([[token]], device=model.device)
            sequence = torch.cat((sequence, step), dim=1)
            logits = model(input_ids=step, **cached).logits[:, -1]
    finally:
        kept.put(read, cache)


class TextStream:
    """Tokens in, certain text out: no half characters, no beginnings of stop texts.

    Args:
        tokenizer: turns tokens into text.
        stop: texts that end the stream.
        hidden_ids: tokens that are never shown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        hidden_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._hidden = hidden_ids
        self._tokens: list[int] = []
        self._begin = 0  # decoding starts here: a token's text depends on those before it
        self._given = 0  # tokens before this have had their text taken
        self._held = ""  # text that could still be the beginning of a stop text
        self.stopped = False

    def add(self, token: int) -> str:
        """Take one token; give the text that is certain now."""
        if self.stopped or token in self._hidden:
            return ""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._begin : self._given])
        now = self._decode(self._tokens[self._begin :])
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._begin, self._given = self._given, len(self._tokens)
        return self._pass(now[len(before) :])

    def rest(self) -> str:
        """Give what was held back, at the end of the stream; half characters are dropped."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._begin : self._given])
        now = self._decode(self._tokens[self._begin :]).rstrip(UNFINISHED)
        self._given = len(self._tokens)
        new = self._pass(now[len(before) :])
        held, self._held = self._held, ""
        return new + ("" if self.stopped else held)

    def _pass(self, text: str) -> str:
        text = self._held + text
        found = [at for it in self._stop if (at := text.find(it)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, it) for it in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text if isinstance(text, str) else "".join(text)


def _overlap(text: str, stop: str) -> int:
    """Count the last characters of `text` that begin `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _cache_name(model: PreTrainedModel) -> str:
    """Name the argument that takes the cache: transformers 5.24 renamed `past_key_values`."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _prefill(
    model: PreTrainedModel, sequence: torch.Tensor, cached: dict[str, Any]
) -> torch.Tensor:
    """Read what the cache lacks of a prompt, in parts; give the logits after its end."""
    if not sequence.shape[1]:
        raise ValueError("an empty prompt")
    output = None
    for part in sequence.split(PREFILL_TOKENS, dim=1):
        output = model(input_ids=part, **cached, logits_to_keep=1)
    assert output is not None
    logits: torch.Tensor = output.logits[:, -1]
    return logits
