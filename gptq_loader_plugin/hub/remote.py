"""Ask the hub what there is: a repository's branches, a branch's files, and a few bytes of one."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from gptq_loader_plugin.errors import HubError
from gptq_loader_plugin.hub.error_messages import is_passing, retry_after

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_plugin.hub.hub_reference import HubReference
    from gptq_loader_plugin.hub.workers import Stop

__all__ = [
    "ASK_WAITS",
    "PICKLE_FILES",
    "SMALL_FILES",
    "WEIGHT_FILES",
    "RemoteBranch",
    "RemoteFile",
    "headers",
    "list_names",
    "look_up",
    "read",
]

SMALL_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
WEIGHT_FILES = ("*.safetensors",)
PICKLE_FILES = ("*.bin", "*.pt", "*.pth")
ASK_WAITS = (0.5, 1.5)  # seconds before a question is asked again: a person waits for its answer
SHA1 = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a branch.

    Attributes:
        name: its name; a checkpoint's files lie at the top of its branch.
        size: its bytes.
        digest: the hash of its content, in hex, which names it in the cache.
        kind: what is hashed: the content, or the content as git stores it.
        url: where it is fetched; names the commit, so it never changes.
    """

    name: str
    size: int
    digest: str
    kind: Literal["sha256", "git"]
    url: str

    def hasher(self) -> hashlib._Hash:
        """Begin to hash its content."""
        if self.kind == "sha256":
            return hashlib.sha256()
        # git names a content so; it is no secret that this protects
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class RemoteBranch:
    """A branch as the hub has it now.

    Attributes:
        hub: the repository and the branch.
        commit: the commit it is at.
        files: those a checkpoint needs, by name.
        license: what its model card says, or "".
        gated: whether its owner lets people in one by one.
    """

    hub: HubReference
    commit: str
    files: tuple[RemoteFile, ...]
    license: str
    gated: bool

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def weight_files(self) -> tuple[RemoteFile, ...]:
        """The files with weights."""
        return tuple(
            file for file in self.files if _matches(file.name, (*WEIGHT_FILES, *PICKLE_FILES))
        )

    def file(self, name: str) -> RemoteFile | None:
        """Find a file by its name."""
        return next((file for file in self.files if file.name == name), None)


def headers() -> dict[str, str]:
    """Make the headers of every request: the token where there is one, and no compression."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return {**build_hf_headers(library_name="gptq-loader"), "accept-encoding": "identity"}


def ask(call: Callable[[], Answer], stop: Stop, *, waits: Sequence[float] = ASK_WAITS) -> Answer:
    """Ask the hub, and again where it has a passing fault of its own."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in waits:
        try:
            return call()
        except HfHubHTTPError as error:
            if not is_passing(error):
                raise
            requested = retry_after(error)
            stop.sleep(wait if requested is None else requested)
    return call()


def list_names(repo: str, stop: Stop) -> dict[str, str]:
    """List a repository's branches, each with its commit, main first."""
    from huggingface_hub import HfApi

    refs = ask(lambda: HfApi().list_repo_refs(repo), stop)
    names = {branch.name: branch.target_commit for branch in refs.branches}
    return dict(sorted(names.items(), key=lambda item: (item[0] != "main", item[0])))


def look_up(hub: HubReference, stop: Stop) -> RemoteBranch:
    """Find a branch's commit, files and licence.

    Raises:
        HubError: the hub does not say what the files hold, or says what cannot be.
    """
    from huggingface_hub import HfApi, constants

    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    info = ask(
        lambda: HfApi().model_info(
            hub.repo, revision=hub.branch, files_metadata=True, timeout=timeout
        ),
        stop,
    )
    commit = str(info.sha)
    if not SHA1.fullmatch(commit):
        raise _unusable(hub, f"commit {commit!r}")
    listed = {
        sibling.rfilename: sibling
        for sibling in info.siblings or ()
        if "/" not in sibling.rfilename
    }
    safe = any(_matches(name, WEIGHT_FILES) for name in listed)
    weights = WEIGHT_FILES if safe else PICKLE_FILES
    chosen = sorted(name for name in listed if _matches(name, (*SMALL_FILES, *weights)))
    return RemoteBranch(
        hub=hub,
        commit=commit,
        files=tuple(_file(hub, commit, listed[name]) for name in chosen),
        license=_license(info),
        gated=bool(info.gated),
    )


def read(file: RemoteFile, stop: Stop, *, begin: int = 0, count: int | None = None) -> bytes:
    """Read some bytes of a file; no more than these are fetched.

    Args:
        file: the file.
        stop: ends it.
        begin: the first byte.
        count: how many; None reads to the end.

    Raises:
        HubError: they came cut short, or the whole file came damaged.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

    count = file.size - begin if count is None else min(count, file.size - begin)
    span = {"range": f"bytes={begin}-{begin + count - 1}"}

    def fetch() -> bytes:
        content = bytearray()
        with get_session().stream(
            "GET",
            file.url,
            headers={**headers(), **span},
            follow_redirects=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as response:
            hf_raise_for_status(response)
            skip = begin if response.status_code == 200 else 0  # no ranges here: read up to it
            with stop.reading(response):
                for chunk in response.iter_bytes():
                    stop.check()
                    content += chunk
                    if len(content) >= skip + count:
                        break
        if len(content) < skip + count:
            raise HubError(f"{file.name} came cut short", hint="run the same command again")
        return bytes(content[skip : skip + count])

    content = ask(fetch, stop) if count > 0 else b""
    if count == file.size:
        hasher = file.hasher()
        hasher.update(content)
        if hasher.hexdigest() != file.digest:
            raise HubError(f"{file.name} came damaged", hint="run the same command again")
    return content


def _file(hub: HubReference, commit: str, listed: Any) -> RemoteFile:  # noqa: ANN401 - hub's type
    from huggingface_hub import hf_hub_url

    name, size = listed.rfilename, listed.lfs.size if listed.lfs else listed.size
    digest = listed.lfs.sha256 if listed.lfs else listed.blob_id
    if "\\" in name or "\0" in name or name.startswith("."):
        raise _unusable(hub, f"a file called {name!r}")
    if not isinstance(size, int) or not (SHA256 if listed.lfs else SHA1).fullmatch(str(digest)):
        raise _unusable(hub, f"no size and hash of {name}")
    url = hf_hub_url(hub.repo, name, revision=commit)
    return RemoteFile(name, size, digest, "sha256" if listed.lfs else "git", url)


def _unusable(hub: HubReference, what: str) -> HubError:
    from gptq_loader_plugin.hub.error_messages import hub_name

    return HubError(
        f"{hub_name()} gives {what} for {hub}, so nothing it sends could be checked",
        hint="use another mirror, or unset HF_ENDPOINT to ask huggingface.co itself",
    )


def _license(info: Any) -> str:  # noqa: ANN401 - the hub's type
    """Read the licence from the card's front matter; the name of an unusual one stands beside."""
    card = info.card_data
    license_, name = (getattr(card, field, None) for field in ("license", "license_name"))
    if isinstance(license_, list):
        license_ = ", ".join(map(str, license_))
    if license_ == "other" and name:
        license_ = name
    if not license_:
        tags = [tag for tag in info.tags or () if tag.startswith("license:")]
        license_ = tags[0].removeprefix("license:") if tags else ""
    link = getattr(card, "license_link", None)
    return f"{license_} ({link})" if license_ and link else str(license_)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
