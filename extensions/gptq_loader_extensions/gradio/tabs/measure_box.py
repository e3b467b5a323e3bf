"""Lay out what measures the models side by side, and draws all measurements."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
import threading
from collections.abc import Iterator  # noqa: TC003
from functools import partial
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.events import AT_ONCE, LOADS, stop
from gptq_loader_extensions.gradio.jobs.measuring import measure, measure_both
from gptq_loader_extensions.gradio.jobs.models import Stopped
from gptq_loader_extensions.gradio.jobs.progress import Finished, progress_bar, run_with_progress
from gptq_loader_extensions.gradio.views.chart import chart_html, text_title
from gptq_loader_extensions.gradio.views.comparison_view import comparison_html
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_plugin.measure.compare import Comparison
    from gptq_loader_plugin.measure.results import MeasuredFiles

__all__ = ["MeasureBox"]

ERRORS = (GPTQLoaderError, MemoryError, RuntimeError, OSError)
SAMPLE, OWN = "The sample, a page of prose", "My own text"


class MeasureBox:
    """The box; made inside the Compare tab, then wired.

    Args:
        sides: each holds one model, or none.
        files: the perplexities that were measured.
    """

    def __init__(self, sides: Sequence[Models], files: MeasuredFiles) -> None:
        self._sides, self._files = sides, files
        self._cancel = gr.State(None)
        gr.HTML("<h2>Bits, perplexity and size</h2>", elem_classes=elements.HEADING_CLASS)
        with gr.Row(elem_id=elements.MEASURE_ROW):
            self._source = gr.Radio(
                [SAMPLE, OWN],
                value=SAMPLE,
                label="Measure on",
                elem_id=elements.MEASURE_ON,
                scale=1,
            )
            self._start = gr.Button("Measure", elem_id=elements.MEASURE, scale=0, min_width=120)
            self._both = gr.Button(
                "Measure both", elem_id=elements.MEASURE_BOTH, scale=0, min_width=120
            )
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
            info="Plain prose of at least 256 tokens; a longer text gives a more stable figure.",
            lines=4,
            max_lines=8,
            elem_id=elements.MEASURE_TEXT,
            visible=False,
        )
        self._progress = gr.HTML("", elem_id=elements.MEASURING, elem_classes=elements.WORK_CLASS)
        self._compared = gr.HTML("", elem_id=elements.COMPARED, elem_classes=elements.SHEET_CLASS)
        self._text = gr.Dropdown(
            [], value=None, label="Measured on", elem_id=elements.MEASURED_ON, visible=False
        )
        self._chart = gr.HTML("", elem_id=elements.CHART, elem_classes=elements.SHEET_CLASS)

    def wire(self, opened: Sequence[Any]) -> None:
        """Connect the box; the chart is redrawn when the page or the tab opens."""
        outputs = [
            self._cancel,
            self._start,
            self._both,
            self._stop,
            self._progress,
            self._text,
            self._chart,
        ]
        redrawn = [self._text, self._chart, self._progress]
        self._source.change(
            lambda source: gr.update(visible=source == OWN), [self._source], [self._own], **AT_ONCE
        )
        self._start.click(self._measure, [self._source, self._own], outputs, **LOADS)
        self._both.click(
            self._measure_both, [self._source, self._own], [*outputs, self._compared], **LOADS
        )
        self._stop.click(stop, [self._cancel], None, **AT_ONCE)
        self._text.select(self._draw, [self._text], [self._chart], **AT_ONCE)
        for event in opened:
            event(self._open, [self._text], redrawn, **AT_ONCE)

    def _measure(self, source: str, own: str) -> Iterator[dict[Any, Any]]:
        """Measure each model that is loaded."""
        cancel, busy = threading.Event(), self._buttons(busy=True)
        bar = progress_bar(Progress("perplexity", 0, 0, detail="cutting the text"))
        yield {self._cancel: cancel, self._progress: bar, **busy}
        text, problem = own if source == OWN else None, ""
        sides = [side for side in self._sides if side.loaded] or self._sides[:1]
        done: list[str] = []
        updates: dict[Any, Any] = {}
        try:
            for side in sides:
                for event in run_with_progress(partial(measure, side, text, cancel)):
                    if isinstance(event, Finished):
                        self._files.keep(event.value)
                        done.append(f"{event.value.name} has {event.value.perplexity:.3f}")
                        updates = self._show(event.value.text.key)
                        yield updates | busy
                    else:
                        yield {self._progress: progress_bar(event), **busy}
        except Stopped:
            done.append("stopped")
        except ERRORS as error:
            problem = alert(format_error(error))
        finally:
            cancel.set()
        summary = f"<p class='done'>Measured: {escape('; '.join(done))}.</p>" if done else ""
        yield {**updates, **self._buttons(busy=False), self._progress: summary + problem}

    def _measure_both(self, source: str, own: str) -> Iterator[dict[Any, Any]]:
        """Compare the two models, and draw how far they are apart."""
        cancel, busy = threading.Event(), self._buttons(busy=True)
        bar = progress_bar(Progress("compare", 0, 0, detail="cutting the text"))
        yield {self._cancel: cancel, self._progress: bar, self._compared: "", **busy}
        text = own if source == OWN else None
        updates: dict[Any, Any] = {}
        try:
            for event in run_with_progress(partial(measure_both, self._sides, text, cancel)):
                if isinstance(event, Finished):
                    updates = self._keep(event.value)
                else:
                    yield {self._progress: progress_bar(event), **busy}
        except Stopped:
            updates = {self._progress: "<p class='done'>Stopped.</p>"}
        except ERRORS as error:
            updates[self._progress] = alert(format_error(error))
        finally:
            cancel.set()
        yield {self._progress: "", **updates, **self._buttons(busy=False)}

    def _keep(self, comparison: Comparison) -> dict[Any, Any]:
        """Draw a comparison, and keep its perplexities for the chart."""
        updates: dict[Any, Any] = {self._compared: comparison_html(comparison)}
        try:
            for figure in comparison.measured:
                self._files.keep(figure)
        except GPTQLoaderError as error:  # the comparison is drawn all the same
            return {**updates, self._progress: alert(format_error(error))}
        return {**updates, **self._show(comparison.measured[0].text.key)}

    def _buttons(self, *, busy: bool) -> dict[Any, Any]:
        """Show what begins a measurement, or what ends the one that runs."""
        return {
            self._start: gr.update(visible=not busy),
            self._both: gr.update(visible=not busy),
            self._stop: gr.update(visible=busy),
        }

    def _open(self, key: str | None) -> dict[Any, Any]:
        return self._show(key or None)

    def _show(self, key: str | None) -> dict[Any, Any]:
        """Draw the figures of a text, or of the one that was measured last."""
        figures, note = self._files.read()
        texts = {figure.text.key: figure.text for figure in reversed(figures)}
        chosen = key if key in texts else next((figure.text.key for figure in figures), None)
        updates = {
            self._text: gr.update(
                choices=[(text_title(text), text.key) for text in texts.values()],
                value=chosen,
                visible=len(texts) > 1,
            ),
            self._chart: chart_html([figure for figure in figures if figure.text.key == chosen]),
        }
        if note:
            updates[self._progress] = f"<p role='note'>{escape(note[:1].upper() + note[1:])}.</p>"
        return updates

    def _draw(self, key: str) -> str:
        figures, _ = self._files.read()
        return chart_html([figure for figure in figures if figure.text.key == key])
