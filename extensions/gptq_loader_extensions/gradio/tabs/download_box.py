"""Lay out what lists a repository's branches and downloads one of them."""

from __future__ import annotations

import threading

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
from collections.abc import Iterator  # noqa: TC003
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.events import AT_ONCE, LOADS
from gptq_loader_extensions.gradio.jobs.progress import Finished, progress_bar, run_with_progress
from gptq_loader_extensions.gradio.views.branches_view import branches_html
from gptq_loader_plugin.errors import DownloadCancelled, GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.hub.hub_reference import parse_hub_reference

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gptq_loader_extensions.gradio.storage.catalog import Catalog
    from gptq_loader_plugin.catalog.branches import RepoReport
    from gptq_loader_plugin.hub.hub_reference import HubReference

__all__ = ["DownloadBox"]


class DownloadBox:
    """The box; made inside the Model tab, then wired.

    Args:
        catalog: lists what is downloaded.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._running: set[tuple[str, threading.Event]] = set()
        with gr.Accordion("Download from the hub", open=False, elem_id=elements.DOWNLOAD):
            with gr.Row(elem_id=elements.REPOSITORY):
                self._repo = gr.Textbox(
                    label="Repository",
                    placeholder="owner/repo or owner/repo:branch",
                    max_lines=1,
                    elem_id=elements.REPO,
                    scale=1,
                )
                self._list = gr.Button(
                    "List branches", elem_id=elements.LIST_BRANCHES, scale=0, min_width=140
                )
            self._table = gr.HTML("", elem_id=elements.BRANCHES, elem_classes=elements.SHEET_CLASS)
            self._branch = gr.Dropdown(
                [], value=None, label="Branch", elem_id=elements.BRANCH, visible=False
            )
            with gr.Row(elem_id=elements.DOWNLOAD_BUTTONS):
                self._download = gr.Button("Download", elem_id=elements.START, variant="primary")
                self._cancel = gr.Button(
                    "Cancel",
                    elem_id=elements.CANCEL,
                    elem_classes=elements.STOPS_CLASS,
                    interactive=False,
                )
            self._progress = gr.HTML(
                "", elem_id=elements.DOWNLOADING, elem_classes=elements.WORK_CLASS
            )

    def wire(self, model: gr.Dropdown, list_models: Callable[[str | None], Any]) -> None:
        """Connect the box; a model that was downloaded is added to the list of models."""

        def download(text: str, chosen: str | None) -> Iterator[dict[Any, Any]]:
            for progress, ended in self._fetch(text):
                yield {
                    self._progress: progress,
                    self._download: gr.update(interactive=ended),
                    self._cancel: gr.update(interactive=not ended),
                    **({model: list_models(chosen)} if ended else {}),
                }

        branches = [self._table, self._branch, self._progress, self._list]
        gr.on(
            [self._list.click, self._repo.submit],
            self._list_branches,
            [self._repo],
            branches,
            **LOADS,
        )
        self._branch.select(_set_branch, [self._repo, self._branch], [self._repo], **AT_ONCE)
        outputs = [self._progress, self._download, self._cancel, model]
        self._download.click(download, [self._repo, model], outputs, **LOADS)
        self._cancel.click(self._stop, [self._repo], None, **AT_ONCE)

    def _list_branches(self, text: str) -> Iterator[dict[Any, Any]]:
        """List a repository's branches."""
        yield {
            self._progress: progress_bar(Progress("branches", 0, 0, "branches")),
            self._list: gr.update(interactive=False),
        }
        updates: dict[Any, Any] = {self._progress: ""}
        try:
            hub = _parse(text)
            for event in run_with_progress(lambda on_progress: _branches(hub, on_progress)):
                if isinstance(event, Finished):
                    names = [branch.branch for branch in event.value.branches]
                    updates[self._table] = branches_html(event.value)
                    updates[self._branch] = gr.update(
                        choices=names,
                        value=hub.branch if hub.branch in names else None,
                        visible=True,
                    )
                else:
                    yield {self._progress: progress_bar(event)}
        except (GPTQLoaderError, OSError) as error:
            updates = {self._progress: alert(format_error(error))}
        yield {**updates, self._list: gr.update(interactive=True)}

    def _fetch(self, text: str) -> Iterator[tuple[str, bool]]:
        """Download a branch; yield what to show, and whether it has ended."""
        yield progress_bar(Progress("download", 0, 0, detail="connecting to the hub")), False
        cancel = threading.Event()
        running = (text.strip(), cancel)
        self._running.add(running)
        try:
            hub = _parse(text)
            for event in run_with_progress(lambda on_progress: self._run(hub, on_progress, cancel)):
                if isinstance(event, Finished):
                    yield f"<p class='done'>Done: {escape(str(hub))}. Choose it above.</p>", True
                else:
                    yield progress_bar(event), False
        except DownloadCancelled:
            yield "<p class='done'>Stopped. Download resumes from here.</p>", True
        except (GPTQLoaderError, OSError) as error:
            yield alert(format_error(error)), True
        finally:
            self._running.discard(running)

    def _run(
        self, hub: HubReference, on_progress: Callable[[Progress], None], cancel: threading.Event
    ) -> Path:
        from gptq_loader_plugin.hub import download

        to = self._catalog.download_folder(hub.folder_name)
        return download(hub, to=to, progress=on_progress, cancelled=cancel.is_set)

    def _stop(self, text: str) -> None:
        """Cancel the download of what is named, whoever started it."""
        for name, cancel in list(self._running):
            if name == text.strip():
                cancel.set()


def _parse(text: str) -> HubReference:
    """Parse what a person typed: a repository, never a path.

    Raises:
        OptionInvalid: it is not a repository.
    """
    hub = parse_hub_reference(text.strip())
    if hub is None or ".." in text:
        raise OptionInvalid(
            f"{text.strip()[:100]!r} is not a repository",
            hint="write owner/repo, or owner/repo:branch",
        )
    return hub


def _branches(hub: HubReference, on_progress: Callable[[Progress], None]) -> RepoReport:
    from gptq_loader_plugin.catalog.branches import list_branches
    from gptq_loader_plugin.device import find_device
    from gptq_loader_plugin.plugins import Plugins

    kernels = Plugins(installed=True).kernels()
    return list_branches(hub, device=find_device(), kernels=kernels, progress=on_progress)


def _set_branch(text: str, branch: str) -> str:
    """Put the branch that was chosen into the name of what is downloaded."""
    return f"{text.strip().partition(':')[0]}:{branch}"
