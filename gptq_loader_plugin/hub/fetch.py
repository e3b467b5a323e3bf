"""Download a branch: into the Hugging Face cache, or into a folder of its own."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.checkpoint.weight_files import KEPT, KEPT_LOCK
from gptq_loader_plugin.errors import (
    CheckpointNotFound,
    DownloadCancelled,
    GPTQLoaderError,
    HubError,
    OptionInvalid,
)
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.hub.cache import RepoCache, cached_folder, lock_of
from gptq_loader_plugin.hub.error_messages import GOES_ON, explained, is_away
from gptq_loader_plugin.hub.remote import look_up
from gptq_loader_plugin.hub.transfer import WAITS, fetch_file, has_content
from gptq_loader_plugin.hub.workers import Cancelled, run_jobs
from gptq_loader_plugin.system.file_lock import held
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gptq_loader_plugin.hub.hub_reference import HubReference
    from gptq_loader_plugin.hub.remote import RemoteBranch, RemoteFile
    from gptq_loader_plugin.hub.workers import Stop

__all__ = ["Downloading", "download", "download_folder", "free_bytes"]

WORKERS = 4  # files at a time: a hub limits each connection, and a checkpoint has few large files
REPORT_SECONDS = 0.1  # seconds between two words about progress
LOOK_UP_LIMIT = 60.0  # seconds; the hub's answer is one small page, asked for up to three times

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Downloading:
    """A download that is about to begin.

    Attributes:
        branch: what is downloaded.
        folder: where its files will be.
        missing: the bytes that are not here yet.
        free: the bytes that are free on that disk.
    """

    branch: RemoteBranch
    folder: Path
    missing: int
    free: int


def download(
    hub: HubReference,
    *,
    to: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    announced: Callable[[Downloading], None] | None = None,
    waits: Sequence[float] = WAITS,
) -> Path:
    """Download a branch, or go on where an earlier download of it stopped.

    Every file's hash is checked. Pickles are fetched only where the branch has no safetensors.

    Args:
        hub: the repository and the branch.
        to: a folder for its files; None puts them into the Hugging Face cache.
        progress: called with how many bytes are here, ten times a second, on this thread.
        cancelled: asked all the time, such as an `Event`'s `is_set`; a yes ends the download.
        announced: told what is about to be fetched, before it is.
        waits: the seconds before each further try where nothing new came.

    Raises:
        CheckpointNotFound: there is no such repository or branch.
        DownloadCancelled: `cancelled` said yes; what was fetched is kept.
        OptionInvalid: `to` holds another checkpoint.
        HubError: the hub could not be reached, or refused, or the disk is too small.
    """
    try:
        looked = run_jobs(
            [partial(_licensed, hub)], workers=1, cancelled=cancelled, limit=LOOK_UP_LIMIT
        )
        return _fetch(
            looked[0],
            _InFolder(looked[0], to) if to is not None else _InCache(looked[0]),
            progress=progress,
            cancelled=cancelled,
            announced=announced,
            waits=waits,
        )
    except Cancelled:
        raise DownloadCancelled(f"the download of {hub} was stopped", hint=GOES_ON) from None
    except KeyboardInterrupt as error:
        error.add_note(f"{hub} is not all here yet; {GOES_ON}")
        raise
    except GPTQLoaderError:
        raise
    except Exception as error:
        raise explained(hub, error) from error


def download_folder(
    hub: HubReference,
    *,
    progress: Callable[[Progress], None],
    cancelled: Callable[[], bool] | None = None,
) -> Path:
    """Download a branch into the cache, or find it there where the hub cannot be asked.

    Raises:
        CheckpointNotFound: there is no such repository or branch.
        DownloadCancelled: `cancelled` said yes; what was fetched is kept.
        HubError: the hub could not be reached, or refused.
    """
    try:
        return download(hub, progress=progress, cancelled=cancelled)
    except HubError as error:
        folder = cached_folder(hub) if error.__cause__ and is_away(error.__cause__) else None
        if folder is None:
            raise
        logger.warning("%s; using the copy of %s that is here", error.message, hub)
        return folder


def _licensed(hub: HubReference, stop: Stop) -> RemoteBranch:
    """Look a branch up; where its own card gives no licence, main's does."""
    branch = look_up(hub, stop)
    if branch.license or hub.branch == "main":
        return branch
    try:
        main = look_up(replace(hub, branch="main"), stop)
    except Cancelled:
        raise
    except Exception:  # noqa: BLE001 - it has no main, or not for us: then nothing tells
        return branch
    return replace(branch, license=main.license)


@dataclass(slots=True)
class _Tally:
    """How many bytes of each file are done; written by workers, read by the caller."""

    total: int
    name: str
    done: dict[str, int] = field(default_factory=dict)
    waits_for: str = ""
    reported: tuple[int, str] = (-1, "")
    reported_at: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, file: RemoteFile, done: int) -> None:
        with self.lock:
            self.done[file.name] = done
            self.waits_for = ""

    def wait(self, file: RemoteFile, done: int, holder: str) -> None:
        with self.lock:
            self.done[file.name] = done
            self.waits_for = f"{holder} is downloading {file.name}"

    def report(self, progress: Callable[[Progress], None]) -> None:
        with self.lock:
            done, waits_for = min(sum(self.done.values()), self.total), self.waits_for
        detail = waits_for or self.name
        often = time.monotonic() - self.reported_at < REPORT_SECONDS and done < self.total
        if often or (done, detail) == self.reported:
            return
        self.reported, self.reported_at = (done, detail), time.monotonic()
        progress(Progress("download", done, self.total, "bytes", detail))


class _InCache:
    """A branch's files as contents of the Hugging Face cache."""

    def __init__(self, branch: RemoteBranch) -> None:
        from huggingface_hub import constants

        self.branch = branch
        self.cache = RepoCache(Path(constants.HF_HUB_CACHE), branch.hub.repo)
        self.cache.ref(branch.hub.branch)
        self.folder = self.cache.snapshot(branch.commit)

    def files(self) -> list[RemoteFile]:
        """List the contents to have; two names may hold the same."""
        return list({file.digest: file for file in self.branch.files}.values())

    def here(self, file: RemoteFile) -> int:
        if self.cache.has(file):
            return file.size
        return _size(self.cache.partial(file))

    def guarded(self, stop: Stop, tally: _Tally) -> AbstractContextManager[None]:  # noqa: ARG002
        """Do nothing: each content has a lock of its own, which branches share."""
        return nullcontext()

    def fetch(self, file: RemoteFile, stop: Stop, tally: _Tally, waits: Sequence[float]) -> None:
        if self.cache.has(file):
            return
        partial_file = self.cache.partial(file)

        def waiting(holder: str) -> None:
            stop.check()
            tally.wait(file, self.here(file), holder)

        with held(self.cache.lock(file), waiting=waiting):
            if not self.cache.has(file):
                on_bytes = partial(tally.count, file)
                fetch_file(file, partial_file, stop, on_bytes=on_bytes, waits=waits)
                partial_file.replace(self.cache.blob(file))

    def finish(self) -> Path:
        branch = self.branch
        return self.cache.publish(branch.hub.branch, branch.commit, branch.files)


class _InFolder:
    """A branch's files in a folder of their own, which appears once all are there."""

    def __init__(self, branch: RemoteBranch, folder: Path) -> None:
        self.branch = branch
        self.folder = folder.expanduser().absolute()
        self.staging = self.folder.with_name(f".{self.folder.name}.download")
        self._check_free()

    def _check_free(self) -> None:
        """Refuse a folder with another checkpoint, or one that is being quantised into."""
        names = {file.name for file in self.branch.files}
        suffixes = {Path(weight_file.name).suffix for weight_file in self.branch.weight_files}
        if any((self.folder / name).exists() for name in (KEPT, KEPT_LOCK)):
            raise OptionInvalid(
                f"{self.folder} is being quantised into, or such a run was interrupted",
                hint="name an empty folder, or one that is not there yet",
            )
        if self.folder.is_dir():
            present = {path.name for path in self.folder.iterdir() if path.suffix in suffixes}
            if other := sorted(present - names):
                raise OptionInvalid(
                    f"{self.folder} holds another checkpoint's {other[0]}",
                    hint="name an empty folder, or one that is not there yet",
                )

    def files(self) -> list[RemoteFile]:
        return list(self.branch.files)

    def here(self, file: RemoteFile) -> int:
        places = (self.folder / file.name, self.staging / file.name, self._partial(file))
        return max(_size(place) for place in places)

    @contextmanager
    def guarded(self, stop: Stop, tally: _Tally) -> Iterator[None]:
        """Keep every other process out of the folder, inside."""

        def waiting(holder: str) -> None:
            stop.check()
            self._check_free()
            for file in self.branch.files:
                tally.wait(file, self.here(file), holder)

        with held(lock_of(self.folder), waiting=waiting):
            self._check_free()
            yield

    def fetch(self, file: RemoteFile, stop: Stop, tally: _Tally, waits: Sequence[float]) -> None:
        on_bytes = partial(tally.count, file)
        places = (self.folder / file.name, self.staging / file.name)
        if not any(has_content(file, place, stop, on_bytes=on_bytes) for place in places):
            fetch_file(file, self._partial(file), stop, on_bytes=on_bytes, waits=waits)
            self._partial(file).replace(self.staging / file.name)

    def finish(self) -> Path:
        if not self.staging.is_dir():
            return self.folder
        if not self.folder.exists():
            self.staging.replace(self.folder)
            return self.folder
        # weights last: a folder without any is no checkpoint to anybody
        for file in sorted(self.branch.files, key=lambda remote_file: remote_file.size):
            if (self.staging / file.name).is_file():
                (self.staging / file.name).replace(self.folder / file.name)
        shutil.rmtree(self.staging)
        return self.folder

    def _partial(self, file: RemoteFile) -> Path:
        return self.staging / f"{file.name}.incomplete"


def _fetch(
    branch: RemoteBranch,
    place: _InCache | _InFolder,
    *,
    progress: Callable[[Progress], None] | None,
    cancelled: Callable[[], bool] | None,
    announced: Callable[[Downloading], None] | None,
    waits: Sequence[float],
) -> Path:
    if not branch.weight_files:
        raise CheckpointNotFound(
            f"{branch.hub} holds no .safetensors, .pt or .bin file",
            reference=str(branch.hub),
            tried=[str(branch.hub)],
            hint=f"list the branches: gptq-loader branches {branch.hub.repo}",
        )
    files = place.files()
    here = {file.name: min(place.here(file), file.size) for file in files}
    tally = _Tally(
        total=sum(file.size for file in files),
        name=f"{branch.hub}, licence {branch.license}" if branch.license else str(branch.hub),
        done={} if isinstance(place, _InFolder) else here,  # a folder's files are hashed again
    )
    missing = tally.total - sum(here.values())
    free = free_bytes(place.folder)
    if announced is not None:
        announced(Downloading(branch, place.folder, missing, free))
    if missing > free:
        raise HubError(
            f"{branch.hub} needs {write_size(missing)} more, and the disk of {place.folder} has "
            f"{write_size(free)} free",
            hint="free some disk space, or put it on another disk: --to DIR, or the cache with "
            "HF_HOME",
        )

    def whole(stop: Stop) -> Path:
        with place.guarded(stop, tally):
            jobs = [partial(_one, place, file, tally, waits) for file in files]
            run_jobs(jobs, workers=WORKERS, cancelled=stop.is_set)
            return place.finish()

    done = sum(tally.done.values()) == tally.total
    on_poll = None if progress is None or done else partial(tally.report, progress)
    return run_jobs([whole], workers=1, cancelled=cancelled, on_poll=on_poll)[0]


def _one(
    place: _InCache | _InFolder,
    file: RemoteFile,
    tally: _Tally,
    waits: Sequence[float],
    stop: Stop,
) -> None:
    place.fetch(file, stop, tally, waits)
    tally.count(file, file.size)


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that a folder is on, or will be."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
