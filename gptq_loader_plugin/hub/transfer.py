"""Fetch one file so that nothing is fetched twice and nothing wrong is kept.

The bytes go into a partial file beside the target, which stays where the process is killed or the
network fails. The next try hashes it and asks for the rest. A file is done when its hash is the
one the hub gives for it; what arrived damaged is fetched once more from the start.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Self

from gptq_loader_plugin.errors import HubError
from gptq_loader_plugin.hub.error_messages import hub_name, is_passing, retry_after, status_of
from gptq_loader_plugin.hub.remote import headers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from gptq_loader_plugin.hub.remote import RemoteFile
    from gptq_loader_plugin.hub.workers import Stop

__all__ = ["WAITS", "fetch_file", "has_content"]

# Seconds before each further try of those that bring nothing new: 15 in all, as long as a hub that
# restarts, and a person, may take.
WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
BLOCK = 1 << 20  # bytes hashed at a time: a thread looks up between two of them


class _CutShort(Exception):
    """The body ended before the file did."""


def fetch_file(
    file: RemoteFile,
    partial: Path,
    stop: Stop,
    *,
    on_bytes: Callable[[int], None],
    waits: Sequence[float] = WAITS,
) -> None:
    """Fetch a file into `partial`, going on with what is there, until its hash is right.

    Args:
        file: the file.
        partial: where its bytes go; left where it is when this fails.
        stop: ends it.
        on_bytes: called with how many bytes are there.
        waits: the seconds before each further try, of those that bring nothing new.

    Raises:
        HubError: it arrived damaged, twice.
    """
    with _Partial(file, partial, stop, on_bytes) as part:
        damaged = 0
        while True:
            _fill(part, stop, waits)
            if part.is_right():
                part.keep()
                return
            damaged += 1
            digest = part.digest
            part.restart()
            if damaged == 2:
                raise HubError(
                    f"{file.name} arrived damaged twice: its hash is {digest[:12]}..., and the hub "
                    f"promised {file.digest[:12]}...",
                    hint="try another network or another time; a proxy, or the mirror that "
                    f"HF_ENDPOINT names, may change files ({hub_name()} was asked)",
                )


def has_content(
    file: RemoteFile, path: Path, stop: Stop, *, on_bytes: Callable[[int], None]
) -> bool:
    """Return whether the file at `path` has this content; reads all of it."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    hasher, length = file.hasher(), 0
    for block in _blocks(path):
        stop.check()
        hasher.update(block)
        on_bytes(length := length + len(block))
    return hasher.hexdigest() == file.digest


def _fill(part: _Partial, stop: Stop, waits: Sequence[float]) -> None:
    """Ask for what is missing until all is there."""
    longest, tries = part.length, 0
    while part.length < part.file.size:
        stop.check()
        try:
            _append(part, stop)
        except Exception as error:
            stop.check()  # it was this that ended the body
            if not _may_pass(error):
                raise
            tries = 0 if part.length > longest else tries + 1
            longest = max(longest, part.length)
            if tries > len(waits):
                raise
            requested = retry_after(error)
            stop.sleep(waits[max(tries - 1, 0)] if requested is None and waits else requested or 0)


def _append(part: _Partial, stop: Stop) -> None:
    """Ask once for what is missing, and keep what comes."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    span = {"range": f"bytes={part.length}-"} if part.length else {}
    with get_session().stream(
        "GET",
        part.file.url,
        headers={**headers(), **span},
        follow_redirects=True,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    ) as response:
        if response.status_code == 416:  # the server has another end: nothing here can be right
            part.restart()
            raise _CutShort(f"{part.file.name} has another length there")
        hf_raise_for_status(response)
        begins = 0
        if response.status_code == 206:
            span_sent = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            begins = int(span_sent[1]) if span_sent else part.length
        if begins != part.length:
            part.restart()
        if begins > part.length:
            raise _CutShort(f"{part.file.name} came from byte {begins} on")
        with stop.reading(response):
            for chunk in response.iter_bytes():
                stop.check()
                part.write(chunk)
                if part.length > part.file.size:
                    return  # more than there is: its hash will be wrong
    if part.length < part.file.size:
        raise _CutShort(f"{part.file.name} ended after {part.length} of {part.file.size} bytes")


def _may_pass(error: Exception) -> bool:
    """Return whether to try again; a signed address, on another host than the hub, runs out."""
    if isinstance(error, _CutShort):
        return True
    if status_of(error) in (401, 403):
        response = error.response  # type: ignore[attr-defined]  # status_of has found it
        return bool(response.history)
    return is_passing(error)


class _Partial:
    """A partial file, and the hash of what is in it."""

    def __init__(
        self, file: RemoteFile, path: Path, stop: Stop, on_bytes: Callable[[int], None]
    ) -> None:
        self.file = file
        self.length = 0
        self.digest = ""
        self._path = path
        self._stop = stop
        self._on_bytes = on_bytes
        self._hasher = file.hasher()

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered, so that what was written is there when the process is killed
        self._stream = self._path.open("ab", buffering=0)
        try:
            for block in _blocks(self._path):
                self._stop.check()
                self._count(block)
        except BaseException:
            self._stream.close()
            raise
        if self.length > self.file.size:
            self.restart()
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def write(self, chunk: bytes) -> None:
        """Append what came."""
        at = 0
        while at < len(chunk):
            at += self._stream.write(chunk[at:])
        self._count(chunk)

    def restart(self) -> None:
        """Forget what is there."""
        self._stream.truncate(0)
        self.length, self._hasher = 0, self.file.hasher()
        self._on_bytes(0)

    def is_right(self) -> bool:
        """Return whether it is the file."""
        self.digest = self._hasher.hexdigest()
        return self.length == self.file.size and self.digest == self.file.digest

    def keep(self) -> None:
        """Have the system write it to the disk, so that a power cut leaves no empty file."""
        os.fsync(self._stream.fileno())

    def _count(self, chunk: bytes) -> None:
        self._hasher.update(chunk)
        self.length += len(chunk)
        self._on_bytes(self.length)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            yield block
