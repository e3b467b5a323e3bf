"""Constrain a reply to JSON, or to a JSON schema, by masking the tokens that would break it.

llguidance (3 MB, no dependencies) tracks the grammar; without it the option is refused.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from gptq_loader_extensions.openai.schema.schemas import ResponseFormat
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["GrammarMask", "grammar_tokenizer", "make_grammar"]


MAX_SCHEMA = 1 << 18  # characters of JSON: one of 3 MB takes llguidance a second for each token


class GrammarMask:
    """Allow only the tokens that continue within a grammar, for one reply.

    Args:
        matcher: llguidance's, at the beginning of its grammar.
        begin: where the reply begins in the sequence.
        vocabulary: how many tokens the matcher's tokenizer has.
    """

    def __init__(self, matcher: Any, begin: int, vocabulary: int) -> None:  # noqa: ANN401
        from llguidance.numpy import allocate_token_bitmask

        self._matcher = matcher
        self._read = begin
        self._mask = allocate_token_bitmask(1, vocabulary)  # int32 [1, ceil(vocabulary / 32)]
        self._fill()  # the first takes the longest, and here nobody waits for it

    def _fill(self) -> None:
        """Mark the tokens that may follow.

        Raises:
            ApiError: the matcher has given up.
        """
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self._matcher, self._mask)
        if error := self._matcher.get_error():
            raise invalid(
                f"the schema cannot be followed: {error.strip()[:500]}", param="response_format"
            )

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits [1, width] with every other token at minus infinity."""
        import numpy as np
        import torch
        from llguidance.numpy import apply_token_bitmask_inplace

        tokens = input_ids[0, self._read :].tolist()
        self._read = input_ids.shape[1]
        if tokens:
            for token in tokens:
                self._matcher.consume_token(token)
            self._fill()
        # Not llguidance.torch's, which torch.compile builds at its first call by a C++ compiler.
        bias = np.zeros(scores.shape, np.float32)
        apply_token_bitmask_inplace(bias, self._mask)
        return scores.masked_fill(torch.from_numpy(bias).to(scores.device) < 0, float("-inf"))


def grammar_tokenizer(model: LoadedModel) -> Any:  # noqa: ANN401 - llguidance's, or None
    """Build llguidance's tokenizer, which takes most of a second and Python's lock with it.

    None where llguidance is not installed or does not take the model's tokenizer.
    """
    tokenizer: Any = model.tokenizer
    try:
        import llguidance.hf
    except ImportError:
        return None
    if not tokenizer.is_fast:
        return None
    end_ids = sorted(model.end_ids(model.template.stop))
    return llguidance.hf.from_tokenizer(tokenizer, eos_token=end_ids)


def make_grammar(
    response_format: ResponseFormat | None,
    vocabulary: Any,  # noqa: ANN401 - llguidance's
    *,
    begin: int,
) -> Callable[[], GrammarMask] | None:
    """Return what makes a mask for each reply; None where any text is allowed.

    Args:
        response_format: the form of the reply.
        vocabulary: the model's `grammar_tokenizer`.
        begin: where the reply begins in the sequence.

    Raises:
        ApiError: the schema cannot be followed, or llguidance is not installed.
    """
    if response_format is None or response_format.type == "text":
        return None
    schema: dict[str, Any] = {"type": "object"}
    if response_format.type == "json_schema":
        if response_format.json_schema is None or response_format.json_schema.content is None:
            raise invalid(
                "response_format json_schema needs a schema: json_schema.schema",
                param="response_format",
            )
        schema = response_format.json_schema.content
    try:
        import llguidance
    except ImportError as error:
        raise invalid(
            "this server cannot keep replies to JSON: it lacks the package llguidance; leave "
            "response_format out, and ask for JSON in the prompt",
            param="response_format",
            code="unsupported_option",
        ) from error
    if vocabulary is None:
        raise invalid(
            "this model's tokenizer cannot be kept to JSON; leave response_format out",
            param="response_format",
            code="unsupported_option",
        )
    written = json.dumps(schema)
    if len(written) > MAX_SCHEMA:
        raise invalid(
            f"the schema has {len(written):,} characters, and may have {MAX_SCHEMA:,}",
            param="response_format",
        )
    grammar = llguidance.LLMatcher.grammar_from_json_schema(written)
    if problem := llguidance.LLMatcher.validate_grammar(grammar, vocabulary):
        raise invalid(
            f"the schema cannot be followed: {problem.strip()[:500]}", param="response_format"
        )
    return lambda: GrammarMask(
        llguidance.LLMatcher(vocabulary, grammar, log_level=0), begin, vocabulary.vocab_size
    )
