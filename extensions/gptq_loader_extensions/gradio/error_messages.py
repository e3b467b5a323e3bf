"""Say what went wrong as a person reads it: what is wrong, then what to do."""

from __future__ import annotations

import logging
from html import escape

from gptq_loader_plugin.errors import GPTQLoaderError, PromptTooLong

__all__ = ["alert", "as_words"]

logger = logging.getLogger(__name__)


def as_words(error: Exception, *, hint: str = "the terminal says more") -> str:
    """Write an error as two sentences; what is not ours to explain goes to the log as well.

    Args:
        error: what was raised.
        hint: what to do about an error that brings no hint of its own.
    """
    if isinstance(error, PromptTooLong):
        return _sentences(error.message, "shorten the message, or the system message")
    if isinstance(error, GPTQLoaderError):
        return _sentences(error.message, error.hint)
    logger.error("the page met an error", exc_info=error)
    if isinstance(error, MemoryError):
        return _sentences("out of memory", "choose a smaller model, or a shorter context")
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return _sentences(f"the model failed: {first}", hint)


def alert(words: str) -> str:
    """Draw an error in the page; nothing where there is none."""
    return f'<div role="alert">{escape(words)}</div>' if words else ""


def _sentences(message: str, hint: str) -> str:
    return ". ".join(f"{it[:1].upper()}{it[1:]}" for it in (message, hint)) + "."
