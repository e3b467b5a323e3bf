"""Lay out what measures the models side by side, and draws all that was measured."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
import threading
from collections.abc import Iterator  # noqa: TC003
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.error_messages import alert, as_words
from gptq_loader_extensions.gradio.events import AT_ONCE, LOADS, stop
from gptq_loader_extensions.gradio.jobs.measuring import measure
from gptq_loader_extensions.gradio.jobs.models import Stopped
from gptq_loader_extensions.gradio.jobs.progress import Done, progress_bar, watched
from gptq_loader_extensions.gradio.views.chart import chart_html, text_title
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_plugin.measure.results import MeasuredFiles

__all__ = ["MeasureBox"]

SAMPLE, OWN = "The sample, a page of prose", "My own text"


class MeasureBox:
    """The box; made inside the Compare tab, then wired.

    Args:
        sides: each holds one model, or none.
        files: the figures that are kept.
    """

    def __init__(self, sides: Sequence[Models], files: MeasuredFiles) -> None:
        self._sides, self._files = sides, files
        self._cancel = gr.State(None)
        gr.HTML("<h2>Bits, perplexity and size</h2>", elem_classes=elements.HEADING_CLASS)
        with gr.Row(elem_id=elements.MEASURE_ROW):
            self._which = gr.Radio(
                [SAMPLE, OWN],
                value=SAMPLE,
                label="Measure on",
                elem_id=elements.MEASURE_ON,
                scale=1,
            )
            self._start = gr.Button("Measure", elem_id=elements.MEASURE, scale=0, min_width=120)
            self._stop = gr.Button(
                "Stop",
                variant="stop",
                elem_id=elements.MEASURE_STOP,
                elem_classes=elements.STOPS_CLASS,
                visible=False,
                scale=0,
                min_width=120,
            )
        self._own = gr.Textbox(
            label="Text",
            info="Plain prose, of 256 tokens at least; longer is steadier.",
            lines=4,
            max_lines=8,
            elem_id=elements.MEASURE_TEXT,
            visible=False,
        )
        self._progress = gr.HTML("", elem_id=elements.MEASURING, elem_classes=elements.WORK_CLASS)
        self._drawn = gr.Dropdown(
            [], value=None, label="Measured on", elem_id=elements.MEASURED_ON, visible=False
        )
        self._chart = gr.HTML("", elem_id=elements.CHART, elem_classes=elements.SHEET_CLASS)

    def wire(self, opened: Sequence[Any]) -> None:
        """Connect the box; the chart is drawn anew when the page or the tab opens."""
        outputs = [self._cancel, self._start, self._stop, self._progress, self._drawn, self._chart]
        shown = [self._drawn, self._chart, self._progress]
        self._which.change(
            lambda which: gr.update(visible=which == OWN), [self._which], [self._own], **AT_ONCE
        )
        self._start.click(self._measure, [self._which, self._own], outputs, **LOADS)
        self._stop.click(stop, [self._cancel], None, **AT_ONCE)
        self._drawn.select(self._draw, [self._drawn], [self._chart], **AT_ONCE)
        for event in opened:
            event(self._open, [self._drawn], shown, **AT_ONCE)

    def _measure(self, which: str, own: str) -> Iterator[dict[Any, Any]]:
        """Measure each model that is loaded."""
        cancel = threading.Event()
        busy = {self._start: gr.update(visible=False), self._stop: gr.update(visible=True)}
        bar = progress_bar(Progress("perplexity", 0, 0, detail="cutting the text"))
        yield {self._cancel: cancel, self._progress: bar, **busy}
        text, problem = own if which == OWN else None, ""
        sides = [it for it in self._sides if it.loaded] or self._sides[:1]
        done: list[str] = []
        shown: dict[Any, Any] = {}
        try:
            for side in sides:
                for event in watched(partial(measure, side, text, cancel)):
                    if isinstance(event, Done):
                        self._files.keep(event.value)
                        done.append(f"{event.value.name} has {event.value.perplexity:.3f}")
                        shown = self._shown(event.value.text.key)
                        yield shown | busy
                    else:
                        yield {self._progress: progress_bar(event), **busy}
        except Stopped:
            done.append("stopped")
        except (GPTQLoaderError, MemoryError, RuntimeError, OSError) as error:
            problem = alert(as_words(error))
        finally:
            cancel.set()
        told = f"<p class='done'>Measured: {escape('; '.join(done))}.</p>" if done else ""
        yield {
            **shown,
            self._start: gr.update(visible=True),
            self._stop: gr.update(visible=False),
            self._progress: told + problem,
        }

    def _open(self, key: str | None) -> dict[Any, Any]:
        return self._shown(key or None)

    def _shown(self, key: str | None) -> dict[Any, Any]:
        """Draw the figures of a text, or of the one that was measured last."""
        figures, note = self._files.read()
        texts = {it.text.key: it.text for it in reversed(figures)}
        chosen = key if key in texts else next((it.text.key for it in figures), None)
        change = {
            self._drawn: gr.update(
                choices=[(text_title(it), it.key) for it in texts.values()],
                value=chosen,
                visible=len(texts) > 1,
            ),
            self._chart: chart_html([it for it in figures if it.text.key == chosen]),
        }
        if note:
            change[self._progress] = f"<p role='note'>{escape(note[:1].upper() + note[1:])}.</p>"
        return change

    def _draw(self, key: str) -> str:
        figures, _ = self._files.read()
        return chart_html([it for it in figures if it.text.key == key])
