"""Download branches of the hub, each in a thread of its own that any page may follow."""

from __future__ import annotations

import threading
import time
from collections import deque
from html import escape
from typing import TYPE_CHECKING

from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.jobs.progress import REDRAW_SECONDS, progress_bar
from gptq_loader_plugin.errors import DownloadCancelled
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gptq_loader_extensions.gradio.storage.catalog import Catalog
    from gptq_loader_plugin.hub.hub_reference import HubReference

__all__ = ["Downloads", "Speed"]

SPEED_SECONDS = 5.0  # over which the speed is measured: it is steady, and follows a change
IDLE_SECONDS = 1.0  # between two looks at a download that stands still


class Speed:
    """How fast something comes, by its last few seconds.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, done: int) -> float | None:
        """Note how much there is now; return how much comes in a second, once that is known."""
        now = self._clock()
        self._samples.append((now, done))
        while now - self._samples[0][0] > SPEED_SECONDS:
            self._samples.popleft()
        seconds, before = self._samples[0]
        return (done - before) / (now - seconds) if now > seconds and done > before else None


class Downloads:
    """The downloads of this process, by their names.

    Args:
        catalog: says where a download goes.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._running: dict[str, _Download] = {}
        self._lock = threading.Lock()

    def running(self) -> str:
        """Return the name of a download that is running, or ""."""
        with self._lock:
            return next((name for name, one in self._running.items() if not one.ended), "")

    def follow(self, hub: HubReference) -> Iterator[tuple[str, bool]]:
        """Start a download, or follow the one that is running; yield what to show, and its end."""
        name = str(hub)
        with self._lock:
            one = self._running.get(name)
            if one is None or one.ended:
                one = self._running[name] = _Download(hub, self._catalog)
        yield from one.follow()

    def cancel(self, name: str) -> None:
        """Cancel a download, whoever started it."""
        with self._lock:
            one = self._running.get(name)
        if one is not None:
            one.cancel.set()


class _Download:
    """A download in a thread of its own."""

    def __init__(self, hub: HubReference, catalog: Catalog) -> None:
        self.cancel = threading.Event()
        self.ended = False
        self._hub, self._to = hub, catalog.download_folder(hub.folder_name)
        self._shown = progress_bar(Progress("download", 0, 0, detail="connecting to the hub"))
        self._speed = Speed()
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="gptq-page-download", daemon=True).start()

    def follow(self) -> Iterator[tuple[str, bool]]:
        """Yield what to show, and whether it has ended, until it has."""
        while True:
            with self._changed:
                shown, ended = self._shown, self.ended
            yield shown, ended
            if ended:
                return
            time.sleep(REDRAW_SECONDS)
            with self._changed:
                if self._shown is shown and not self.ended:
                    self._changed.wait(IDLE_SECONDS)

    def _run(self) -> None:
        from gptq_loader_plugin.hub import download

        try:
            download(self._hub, to=self._to, progress=self._show, cancelled=self.cancel.is_set)
            text = f"<p class='done'>Done: {escape(str(self._hub))}. Choose it above.</p>"
        except DownloadCancelled:
            text = "<p class='done'>Stopped. Download resumes from here.</p>"
        except Exception as error:  # noqa: BLE001 - whoever follows it must see that it ended
            text = alert(format_error(error))
        with self._changed:
            self._shown, self.ended = text, True
            self._changed.notify_all()

    def _show(self, progress: Progress) -> None:
        shown = progress_bar(progress, speed=self._speed.add(progress.done))
        with self._changed:
            self._shown = shown
            self._changed.notify_all()
