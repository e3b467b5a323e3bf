"""Show the prompt exactly as the model gets it, with its special tokens marked."""

from __future__ import annotations

from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

__all__ = ["prompt_html"]


def prompt_html(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, context: int) -> str:
    """Draw a prompt from its tokens: what a user typed never looks like a special token."""
    special = frozenset(tokenizer.all_special_ids)
    parts = []
    for marked, group in groupby(ids, key=special.__contains__):
        tokens = list(group)
        if marked:
            parts += [f"<mark>{escape(_decoded(tokenizer, [token]))}</mark>" for token in tokens]
        else:
            parts.append(escape(_decoded(tokenizer, tokens)))
    return (
        f"<p>{len(ids):,} tokens of {context:,}; special tokens are marked</p>"
        f"<pre tabindex='0'>{''.join(parts)}</pre>"
    )


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text if isinstance(text, str) else "".join(text)
