"""Lay out what checks the chosen checkpoint, and says which other programs take it."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
import threading
from collections.abc import Iterator  # noqa: TC003
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.events import AT_ONCE, LOADS, stop
from gptq_loader_extensions.gradio.jobs.checking import check, find_engines
from gptq_loader_extensions.gradio.jobs.models import Stopped
from gptq_loader_extensions.gradio.jobs.progress import Finished, progress_bar, run_with_progress
from gptq_loader_extensions.gradio.views.check_view import engines_html, report_html
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from gptq_loader_extensions.gradio.storage.catalog import Catalog, CatalogEntry

__all__ = ["CheckBox"]

ERRORS = (GPTQLoaderError, MemoryError, RuntimeError, OSError)


class CheckBox:
    """The box; made inside the Model tab, then wired.

    Args:
        catalog: what may be checked.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._cancel = gr.State(None)
        with gr.Row(elem_id=elements.CHECK_ROW):
            self._start = gr.Button("Check it", elem_id=elements.CHECK)
            self._stop = gr.Button(
                "Stop",
                variant="stop",
                elem_id=elements.CHECK_STOP,
                elem_classes=elements.STOPS_CLASS,
                visible=False,
            )
            self._where = gr.Button("Where else does it run?", elem_id=elements.WHERE)
        self._progress = gr.HTML("", elem_id=elements.CHECKING, elem_classes=elements.WORK_CLASS)
        self._report = gr.HTML("", elem_id=elements.CHECKED, elem_classes=elements.SHEET_CLASS)
        self._engines = gr.HTML("", elem_id=elements.ENGINES, elem_classes=elements.SHEET_CLASS)

    def wire(self, model: gr.Dropdown) -> None:
        """Connect the buttons with the model that is chosen; another one clears what they show."""
        outputs = [self._cancel, self._start, self._stop, self._progress, self._report]
        self._start.click(self._check, [model], outputs, **LOADS)
        self._stop.click(stop, [self._cancel], None, **AT_ONCE)
        self._where.click(self._ask, [model], [self._engines, self._progress], **LOADS)
        shown = [self._report, self._engines, self._progress]
        model.select(lambda: ["", "", ""], None, shown, **AT_ONCE)

    def _check(self, name: str | None) -> Iterator[dict[Any, Any]]:
        """Verify the checkpoint, with its progress."""
        cancel = threading.Event()
        busy = {self._start: gr.update(visible=False), self._stop: gr.update(visible=True)}
        updates: dict[Any, Any] = {self._progress: ""}
        try:
            entry = self._find(name)
            bar = progress_bar(Progress("checkpoint", 0, 0, detail=entry.name))
            yield {self._cancel: cancel, self._progress: bar, self._report: "", **busy}
            for event in run_with_progress(partial(check, entry, cancel)):
                if isinstance(event, Finished):
                    updates[self._report] = report_html(event.value, entry.name)
                else:
                    yield {self._progress: progress_bar(event), **busy}
        except Stopped:
            updates = {self._progress: "<p class='done'>Stopped.</p>"}
        except ERRORS as error:
            updates = {self._progress: alert(format_error(error))}
        finally:
            cancel.set()
        yield {
            **updates,
            self._start: gr.update(visible=True),
            self._stop: gr.update(visible=False),
        }

    def _ask(self, name: str | None) -> dict[Any, Any]:
        """Show which programs take the checkpoint."""
        try:
            return {self._engines: engines_html(find_engines(self._find(name))), self._progress: ""}
        except ERRORS as error:
            return {self._engines: "", self._progress: alert(format_error(error))}

    def _find(self, name: str | None) -> CatalogEntry:
        if not name:
            raise GPTQLoaderError("no model is chosen", hint="choose one in the list")
        return self._catalog.find(name)
