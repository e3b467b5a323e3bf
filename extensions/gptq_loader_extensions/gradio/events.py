"""Name how the page's events run; none of them is an API for programs.

A generator that yields a component's `gr.update` names it again in what it yields right after: of
two messages that reach the browser within a moment, gradio 6.31 draws the second alone, and a
change of a button that only the first had is lost. Values are not.
"""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
import threading  # noqa: TC003
from html import escape
from typing import Any

import gradio as gr

from gptq_loader_extensions.gradio.versions import known

__all__ = ["AT_ONCE", "LOADS", "PRIVATE", "REPLIES", "show_error", "stop"]

# Replies written at once; each has its own cache, and they share the machine. More wait.
REPLIES_AT_ONCE = 4

PRIVATE: dict[str, Any] = known(gr.Button.click, api_visibility="private") or {"api_name": False}
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", **PRIVATE}
REPLIES: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": REPLIES_AT_ONCE,
    "concurrency_id": "replies",
    **PRIVATE,
}
LOADS: dict[str, Any] = {
    "show_progress": "hidden",
    "concurrency_limit": None,  # a load that waits for another one says so in the page
    **PRIVATE,
}


def show_error(problem: str) -> None:
    """Show an error, in an event of its own: gradio covers the outputs of one that fails."""
    if problem:
        raise gr.Error(escape(problem), **known(gr.Error, duration=None, print_exception=False))


def stop(cancel: threading.Event | None) -> None:
    """Cancel what is running."""
    if cancel is not None:
        cancel.set()
