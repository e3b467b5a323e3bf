"""Where things lie in the Hugging Face cache, so that every library finds what we put there.

A repository's folder holds `blobs/HASH`, `snapshots/COMMIT/NAME`, which are links to blobs, and
`refs/BRANCH`, which holds a commit: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
A blob gets its name once its hash is right, a snapshot its links once every blob is there, and a
branch its commit last.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from gptq_loader_plugin.checkpoint.weight_files import find_weight_files
from gptq_loader_plugin.errors import AmbiguousReference, GPTQLoaderError, OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_plugin.hub.hub_reference import HubReference
    from gptq_loader_plugin.hub.remote import RemoteFile

__all__ = ["RepoCache", "cached_folder", "lock_of"]

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class RepoCache:
    """One repository's folder in the cache.

    Attributes:
        root: the cache.
        repo: "owner/name".
    """

    root: Path
    repo: str

    @property
    def name(self) -> str:
        """The folder's name."""
        from huggingface_hub import constants

        return constants.REPO_ID_SEPARATOR.join(("models", *self.repo.split("/")))

    @property
    def folder(self) -> Path:
        """The folder."""
        return self.root / self.name

    def blob(self, file: RemoteFile) -> Path:
        """Name the place of a content."""
        return self.folder / "blobs" / file.digest

    def partial(self, file: RemoteFile) -> Path:
        """Name the place of a content that is not all there; another program may go on with it."""
        return self.folder / "blobs" / f"{file.digest}.incomplete"

    def lock(self, file: RemoteFile) -> Path:
        """Name the lock of a content, which huggingface_hub takes too."""
        return self.root / ".locks" / self.name / f"{file.digest}.lock"

    def snapshot(self, commit: str) -> Path:
        """Name the folder of a commit."""
        return self.folder / "snapshots" / commit

    def ref(self, branch: str) -> Path:
        """Name the file that holds a branch's commit.

        Raises:
            OptionInvalid: no branch can be called so.
        """
        refs = self.folder / "refs"
        path = Path(os.path.normpath(refs / branch))
        if not path.is_relative_to(refs) or path == refs:
            raise OptionInvalid(
                f"no branch is called {branch!r}",
                hint=f"list the branches: gptq-loader branches {self.repo}",
            )
        return path

    def has(self, file: RemoteFile) -> bool:
        """Return whether a content is there, by its size."""
        blob = self.blob(file)
        return blob.is_file() and blob.stat().st_size == file.size

    def publish(self, branch: str, commit: str, files: Sequence[RemoteFile]) -> Path:
        """Link a commit's files, weights last, then give the branch its commit."""
        folder = self.snapshot(commit)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(files, key=lambda remote_file: (remote_file.size, remote_file.name)):
            _link(self.blob(file), folder / file.name)
        if branch != commit:
            ref = self.ref(branch)
            if not ref.is_file() or ref.read_text(encoding="utf-8") != commit:
                ref.parent.mkdir(parents=True, exist_ok=True)
                _replace(ref, lambda path: path.write_text(commit, encoding="utf-8"))
        return folder


def cached_folder(hub: HubReference) -> Path | None:
    """Find a branch in the cache, without the network; None where it is not all there."""
    from huggingface_hub import constants

    cache = RepoCache(Path(constants.HF_HUB_CACHE), hub.repo)
    if COMMIT.fullmatch(hub.branch):
        commit = hub.branch
    else:
        ref = cache.ref(hub.branch)
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else ""
    folder = cache.snapshot(commit)
    if not commit or not folder.is_dir():
        return None
    try:
        find_weight_files(folder)
    except AmbiguousReference:  # they are there: the user will say which one
        return folder
    except GPTQLoaderError:
        return None
    return folder


def lock_of(folder: Path) -> Path:
    """Name the lock of a plain folder; it lies in the cache, so that nothing lies about there."""
    from huggingface_hub import constants

    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()
    return Path(constants.HF_HUB_CACHE) / ".locks" / "folders" / f"{name}.lock"


def _link(blob: Path, path: Path) -> None:
    """Make `path` a link to `blob`, or a copy where the system has no links."""
    target = os.path.relpath(blob, path.parent)
    if path.is_symlink() and path.readlink() == Path(target):
        return
    if not path.is_symlink() and path.is_file() and path.stat().st_size == blob.stat().st_size:
        return

    def make(temporary: Path) -> None:
        with suppress(OSError):  # Windows asks for a right that few have
            temporary.symlink_to(target)
            return
        shutil.copyfile(blob, temporary)

    _replace(path, make)


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Put a file in its place in one step."""
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        make(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
