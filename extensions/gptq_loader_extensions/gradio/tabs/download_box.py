"""Lay out what lists a repository's branches and downloads one of them."""

from __future__ import annotations

# Before version 6 gradio reads the types of what it calls, so these are imported for real.
from collections.abc import Iterator  # noqa: TC003
from typing import TYPE_CHECKING, Any

import gradio as gr

from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.events import AT_ONCE, LOADS, PRIVATE
from gptq_loader_extensions.gradio.jobs.downloads import Downloads
from gptq_loader_extensions.gradio.jobs.progress import Finished, progress_bar, run_with_progress
from gptq_loader_extensions.gradio.views.branches_view import branches_html
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.hub.hub_reference import parse_hub_reference

if TYPE_CHECKING:
    from collections.abc import Callable

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
        self._downloads = Downloads(catalog)
        self._box = gr.Accordion("Download from the hub", open=False, elem_id=elements.DOWNLOAD)
        with self._box:
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
            self._pick = gr.Button(
                "pick", elem_id=elements.PICK, elem_classes=elements.CARRIER_CLASS
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

    def wire(
        self, page: gr.Blocks, model: gr.Dropdown, list_models: Callable[[str | None], Any]
    ) -> None:
        """Connect the box; a model that was downloaded is added to the list of models."""

        def show(text: str, chosen: str | None) -> Iterator[dict[Any, Any]]:
            for progress, ended in self._follow(text):
                yield {
                    self._progress: progress,
                    self._download: gr.update(interactive=ended),
                    self._cancel: gr.update(interactive=not ended),
                    **({model: list_models(chosen)} if ended else {}),
                }

        def find_again(chosen: str | None) -> Iterator[dict[Any, Any]]:
            """Show a download that is running to a page that opens."""
            name = self._downloads.running()
            if not name:
                yield {self._progress: ""}
                return
            yield {self._box: gr.update(open=True), self._repo: name}
            yield from show(name, chosen)

        listing = gr.on(
            [self._list.click, self._repo.submit],
            self._list_branches,
            [self._repo],
            [self._table, self._progress, self._list],
            **LOADS,
        )
        mark = "(text) => { gptqPage.markBranch(text) }"
        listing.then(None, [self._repo], None, js=mark, **PRIVATE)
        # a table of another repository goes; a row that is pressed names its branch
        self._repo.change(
            None,
            [self._repo, self._table],
            [self._table],
            js="(text, table) => gptqPage.markBranch(text) ? table : ''",
            **AT_ONCE,
        )
        self._pick.click(None, None, [self._repo], js="() => gptqPage.picked()", **AT_ONCE)
        outputs = [self._progress, self._download, self._cancel, model]
        self._download.click(show, [self._repo, model], outputs, **LOADS)
        self._cancel.click(self._stop, [self._repo], None, **AT_ONCE)
        page.load(find_again, [model], [*outputs, self._box, self._repo], **LOADS)

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
                    updates[self._table] = branches_html(event.value)
                else:
                    yield {self._progress: progress_bar(event)}
        except (GPTQLoaderError, OSError) as error:
            updates = {self._progress: alert(format_error(error)), self._table: ""}
        yield {**updates, self._list: gr.update(interactive=True)}

    def _follow(self, text: str) -> Iterator[tuple[str, bool]]:
        """Download a branch; yield what to show, and whether it has ended."""
        try:
            hub = _parse(text)
        except GPTQLoaderError as error:
            yield alert(format_error(error)), True
            return
        yield from self._downloads.follow(hub)

    def _stop(self, text: str) -> None:
        """Cancel the download of what is named, whoever started it."""
        try:
            self._downloads.cancel(str(_parse(text)))
        except GPTQLoaderError:
            return


def _parse(text: str) -> HubReference:
    """Parse what a person typed: a repository, never a path.

    Raises:
        OptionInvalid: it is not a repository.
    """
    hub = parse_hub_reference("".join(text.split()))
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
