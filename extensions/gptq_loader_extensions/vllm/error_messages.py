"""Say our errors as vLLM shows them: the next step in the text, and able to cross processes."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["in_words"]


@contextmanager
def in_words() -> Iterator[None]:
    """Turn an error of this package into a ValueError with its message and hint."""
    try:
        yield
    except GPTQLoaderError as error:
        raise ValueError(f"gptq_loader: {error.message}\nhint: {error.hint}") from error
