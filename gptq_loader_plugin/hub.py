"""Fetch a repository's branch from the hub; huggingface_hub does the work.

`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean here what they mean to it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import CheckpointNotFound, GPTQLoaderError, HubError
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptq_loader_plugin.reference import HubReference

__all__ = ["cached_folder", "download_folder"]

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*")
WEIGHT_FILES = ("*.safetensors",)
PICKLE_FILES = ("*.bin", "*.pt", "*.pth")


def cached_folder(hub: HubReference) -> Path | None:
    """Find a branch in the cache, without the network; None where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub.repo, revision=hub.branch, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.pt")]
    return folder if weights else None


def download_folder(hub: HubReference, *, progress: Callable[[Progress], None]) -> Path:
    """Fetch a branch into the cache, or find it there; an interrupted download goes on.

    Pickles are fetched only where the branch has no safetensors.

    Raises:
        CheckpointNotFound: there is no such repository or branch.
        HubError: the hub could not be reached, or refused.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(hub.repo, revision=hub.branch)
    except Exception as error:
        folder = _offline(hub, error)
        if folder is None:
            raise _explained(hub, error) from error
        return folder
    safe = any(name.endswith(".safetensors") for name in names)
    patterns = [*SMALL_FILES, *(WEIGHT_FILES if safe else PICKLE_FILES)]
    try:
        fetched = snapshot_download(
            hub.repo,
            revision=hub.branch,
            allow_patterns=patterns,
            tqdm_class=_told_bar(progress, f"{hub.repo}:{hub.branch}"),
        )
    except Exception as error:
        raise _explained(hub, error) from error
    return Path(fetched)


def _told_bar(progress: Callable[[Progress], None], detail: str) -> type[Any]:
    """Make a class of tqdm bars that draw nothing and tell `progress` the bytes instead."""
    from tqdm import tqdm

    most = 0

    class ToldBar(tqdm):  # type: ignore[misc]  # it has no types
        def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401 - tqdm's own
            options.pop("name", None)
            super().__init__(*args, **{**options, "disable": False, "file": io.StringIO()})

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal most
            done: bool | None = super().update(n)
            if self.unit == "B" and self.total and self.n > most:
                most = int(self.n)
                progress(Progress("download", most, max(int(self.total), most), "bytes", detail))
            return done

    return ToldBar


def _offline(hub: HubReference, error: Exception) -> Path | None:
    """Use the cache when the hub cannot be reached, and only then."""
    return None if _status(error) is not None else cached_folder(hub)


def _status(error: Exception) -> int | None:
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _explained(hub: HubReference, error: Exception) -> GPTQLoaderError:
    """Turn what huggingface_hub raised into words; anything unknown stays what it was."""
    from huggingface_hub import errors

    name = f"{hub.repo}:{hub.branch}"
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{hub.repo} is gated: its owner must let you in",
            hint="accept its terms on its page, then log in: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFound(
            f"{hub.repo} has no branch, tag or commit {hub.branch}",
            reference=name,
            tried=[name],
            hint="look at the branches on its page, and write owner/repo:branch",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointNotFound(
            f"there is no repository {hub.repo} on the hub, or it is private",
            reference=name,
            tried=[name],
            hint="check its spelling; for a private one, log in: hf auth login",
        )
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return HubError(
        f"{name} could not be fetched ({type(error).__name__}: {first[:200]})",
        hint="check the network, HF_ENDPOINT and free disk space, then run the same command "
        "again: a download goes on where it stopped",
    )
