"""Raise our errors as vLLM shows them: with the hint in the text, and able to be pickled."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import GPTQLoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["as_value_error"]


@contextmanager
def as_value_error() -> Iterator[None]:
    """Turn an error of this package into a ValueError with its message and hint."""
    try:
        yield
    except GPTQLoaderError as error:
        raise ValueError(f"gptq_loader: {error.message}\nhint: {error.hint}") from error
