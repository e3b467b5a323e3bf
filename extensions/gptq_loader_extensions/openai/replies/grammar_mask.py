"""Allow only the tokens that continue within a grammar, from where it holds on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

__all__ = ["GrammarMask"]


class GrammarMask:
    """Allow only the tokens that continue within a grammar, for one reply.

    Args:
        make_matcher: makes llguidance's, at the beginning of its grammar.
        begin: where the reply begins in the sequence.
        vocabulary: llguidance's tokenizer.
        param: the field of the request that asks for it.
        after: the text from whose end on the grammar holds; "" from the beginning.
        opening: a token that the reply may begin with all the same; then `after` is awaited.
        banned: tokens that may not come before the grammar holds.
        repeats: whether, once it is complete, any text is allowed until `after` comes again.
    """

    def __init__(
        self,
        make_matcher: Callable[[], Any],
        begin: int,
        vocabulary: Any,  # noqa: ANN401 - llguidance's
        *,
        param: str = "response_format",
        after: str = "",
        opening: int | None = None,
        banned: Sequence[int] = (),
        repeats: bool = False,
    ) -> None:
        from llguidance.numpy import allocate_token_bitmask

        self._make_matcher, self._vocabulary = make_matcher, vocabulary
        self._begin = self._read = begin
        self._param = param
        self._after, self._opening = after.encode(), opening
        self._banned, self._repeats = list(banned), repeats
        self._mask = allocate_token_bitmask(1, vocabulary.vocab_size)  # int32 [1, ceil(size / 32)]
        self._text = b""  # the end of the text since the grammar held last
        self._matcher: Any = None
        if opening is not None or not after:
            self._hold()  # the first mask takes the longest, and here nobody waits for it

    def _hold(self, text: bytes = b"") -> None:
        """Have the grammar hold, after a text that is within it already."""
        self._matcher = self._make_matcher()
        if text.strip():
            self._matcher.consume_tokens(self._vocabulary.tokenize_bytes(text))
        self._fill()

    def _fill(self) -> None:
        """Mark the tokens that may follow.

        Raises:
            ApiError: the matcher has given up.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        if error := self._matcher.get_error():
            raise invalid(
                f"the schema cannot be followed: {error.strip()[:500]}", param=self._param
            )

    def _follow(self, token: int) -> None:
        """Note a token that was sampled."""
        at_beginning = self._read == self._begin
        if self._matcher is not None and at_beginning and token == self._opening:
            self._matcher = None
            return
        if self._matcher is not None:
            self._matcher.consume_token(token)
            if self._repeats and self._matcher.is_stopped():
                self._matcher, self._text = None, b""
            return
        self._text += self._vocabulary.decode_bytes([token])
        before, reached, rest = self._text.partition(self._after)
        if reached:
            self._hold(rest)
        else:
            self._text = before[-len(self._after) :]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits [1, width] with every other token at minus infinity."""
        import numpy as np
        import torch
        from llguidance.numpy import apply_token_bitmask_inplace

        tokens = input_ids[0, self._read :].tolist()
        held = self._matcher
        for token in tokens:
            self._follow(token)
            self._read += 1
        if self._matcher is None:
            if self._banned:
                scores = scores.clone()
                scores[0, self._banned] = float("-inf")
            return scores
        if tokens and self._matcher is held:
            self._fill()
        # Not llguidance.torch's, which torch.compile builds at its first call by a C++ compiler.
        bias = np.zeros(scores.shape, np.float32)
        apply_token_bitmask_inplace(bias, self._mask)
        allowed = torch.from_numpy(bias).to(scores.device) >= 0
        if self._opening is not None and self._read == self._begin:
            allowed[0, self._opening] = True
        return scores.masked_fill(~allowed, float("-inf"))
