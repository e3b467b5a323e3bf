"""Format an error for a person: what is wrong, then what to do."""

from __future__ import annotations

import logging
from html import escape

from gptq_loader_plugin.errors import GPTQLoaderError, PromptTooLong

__all__ = ["alert", "format_error"]

logger = logging.getLogger(__name__)


def format_error(error: Exception, *, hint: str = "the terminal says more") -> str:
    """Write an error as two sentences; one that we do not explain is logged as well.

    Args:
        error: what was raised.
        hint: what to do about an error without a hint of its own.
    """
    if isinstance(error, PromptTooLong):
        return _sentences(error.message, "shorten the message, or the system message")
    if isinstance(error, GPTQLoaderError):
        return _sentences(error.message, error.hint)
    logger.error("unexpected error in the page", exc_info=error)
    if isinstance(error, MemoryError):
        return _sentences("out of memory", "choose a smaller model, or a shorter context")
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return _sentences(f"the model failed: {first}", hint)


def alert(text: str) -> str:
    """Draw an error in the page; nothing where there is none."""
    return f'<div role="alert">{escape(text)}</div>' if text else ""


def _sentences(message: str, hint: str) -> str:
    return ". ".join(f"{text[:1].upper()}{text[1:]}" for text in (message, hint)) + "."
