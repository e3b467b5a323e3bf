"""Write a reply to stdout as it comes; make the system message of a chat."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from gptq_loader_plugin.cli.output import say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["system_message", "write_reply"]


def write_reply(model: LoadedModel, pieces: Iterator[Piece]) -> None:
    """Write a reply to stdout as it comes, and what it took to stderr."""
    began = time.monotonic()
    last = None
    for last in pieces:
        sys.stdout.write(last.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if last is not None:
        rate = last.tokens / max(time.monotonic() - began, 1e-9)
        say(f"{last.tokens} tokens, {rate:.0f} a second; {model.plan.headline()}")


def system_message(model: LoadedModel, system: str | None) -> list[dict[str, str]]:
    """Make the system message: the user's, or with "card" the one the model card gives."""
    if system is None:
        return []
    if system != "card":
        return [{"role": "system", "content": system}]
    if model.card.system is None:
        from gptq_loader_plugin.errors import TemplateError

        raise TemplateError(
            "the model card gives no system message",
            hint="write one yourself: --system 'You are ...'",
        )
    return [{"role": "system", "content": model.card.system}]
