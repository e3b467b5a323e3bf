"""Write a reply of each of several models in turns, each timed alone."""

from __future__ import annotations

import time
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio.jobs.reply import write_reply

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Sequence

    from gptq_loader_extensions.gradio.jobs.conversation import ChatState
    from gptq_loader_extensions.gradio.jobs.models import EncodedPrompt, Models
    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.generation.options import GenerateOptions

__all__ = ["by_turns", "difference_html"]

QUOTED = 40  # characters of where two replies diverge that are shown


def by_turns(
    sides: Sequence[Models],
    prepare: Callable[[LoadedModel], EncodedPrompt],
    options: GenerateOptions,
    *,
    cancel: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[int, ChatState]]:
    """Write a reply of each side; yield the side's index, and the state of its reply.

    They take turns, so that one does not slow the other down; the clock of a side stands still
    while another writes.

    Args:
        sides: each holds one model.
        prepare: makes the prompt.
        options: how to sample.
        cancel: ends all replies once it is set.
        clock: returns seconds.

    Raises:
        GPTQLoaderError: a side has no model, or the prompt does not fit it.
    """
    watches = [_Stopwatch(clock) for _ in sides]
    running = {
        at: write_reply(side, prepare, options, cancel=cancel, clock=watches[at].seconds)
        for at, side in enumerate(sides)
    }
    while running:
        for at, reply in list(running.items()):
            with watches[at].running():
                state = next(reply, None)
            if state is None:
                del running[at]
            else:
                yield at, state


def difference_html(one: str, other: str) -> str:
    """Draw from where two replies differ, and how each goes on there."""
    if one == other:
        return "<p>Both replies are the same.</p>"
    pairs = zip(one, other, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    if not same:
        return "<p>The replies differ from the first character.</p>"
    last = escape(" ".join(one[max(0, same - QUOTED) : same].split()))
    goes_on = [escape(" ".join(text[same : same + QUOTED].split())) or "…" for text in (one, other)]
    return (
        f"<p>The replies are the same for {same:,} characters, up to “{last}”. Then the first goes "
        f"on <mark>{goes_on[0]}</mark> and the second <mark>{goes_on[1]}</mark></p>"
    )


class _Stopwatch:
    """Seconds that count only while it runs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._before = 0.0
        self._began: float | None = None

    def seconds(self) -> float:
        """Return the seconds it has run."""
        now = 0.0 if self._began is None else self._clock() - self._began
        return self._before + now

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run for a while."""
        self._began = self._clock()
        try:
            yield
        finally:
            self._before, self._began = self.seconds(), None
