"""What the hub, the network or the disk refused, and what to do about it."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gptq_loader_plugin.errors import CheckpointNotFound, GPTQLoaderError, HubError

if TYPE_CHECKING:
    from gptq_loader_plugin.hub.hub_reference import HubReference

__all__ = ["GOES_ON", "explained", "hub_name", "is_away", "is_passing", "retry_after", "status_of"]

GOES_ON = "run the same command again: it goes on where it stopped"
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be others in a moment
PROXIES = ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
MAX_WAIT = 60.0  # seconds; a server that asks for more is told about instead


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an error is about, if it is about one."""
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def is_passing(error: BaseException) -> bool:
    """Return whether the same request may be answered in a moment."""
    status = status_of(error)
    return status in PASSING if status is not None else "TransportError" in _kinds(error)


def is_away(error: BaseException) -> bool:
    """Return whether the hub did not answer at all, or has a fault of its own: a cache may do."""
    status = status_of(error)
    if status is not None:
        return status in PASSING
    return isinstance(error, OSError | TimeoutError) or "TransportError" in _kinds(error)


def retry_after(error: BaseException) -> float | None:
    """Return the seconds that the server asks to wait before the next request."""
    response: Any = getattr(error, "response", None)
    seconds = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(seconds), MAX_WAIT) if seconds.isdigit() else None


def hub_name() -> str:
    """Name the hub that is asked: its address, and that it is a mirror where it is one."""
    return f"{_address()} (HF_ENDPOINT)" if os.environ.get("HF_ENDPOINT") else _address()


def _address() -> str:
    """Return the hub's address without the name and password that may be in it."""
    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    return f"{place.scheme}://{place.netloc.rpartition('@')[2]}"


def explained(hub: HubReference, error: BaseException) -> GPTQLoaderError:
    """Turn what was raised while `hub` was asked about into one of our errors."""
    from huggingface_hub import errors

    if isinstance(error, GPTQLoaderError):
        return error
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubError(
            f"HF_HUB_OFFLINE keeps the hub from being asked about {hub}",
            hint="unset HF_HUB_OFFLINE, or download it where there is a network and copy the "
            "folder here",
        )
    status = status_of(error)
    if status is not None:
        return _refused(hub, error, status)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return HubError(
            f"the disk is full, and {hub} is not all there",
            hint=f"free some disk space, then {GOES_ON}",
        )
    return _unreached(hub, error)


def _refused(hub: HubReference, error: BaseException, status: int) -> GPTQLoaderError:
    from huggingface_hub import errors

    page = f"{_address()}/{hub.repo}"
    if isinstance(error, errors.GatedRepoError):
        with_token = status == 403
        return HubError(
            f"{hub.repo} is gated: "
            + ("your account has not been let in" if with_token else "its owner must let you in"),
            hint=f"accept its terms on {page}, "
            + ("and wait for its owner" if with_token else "then log in: hf auth login"),
            status=status,
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointNotFound(
            f"{hub.repo} has no branch, tag or commit {hub.branch}",
            reference=str(hub),
            tried=[str(hub)],
            hint=f"list its branches: gptq-loader branches {hub.repo}",
        )
    message = str(
        getattr(getattr(error, "response", None), "headers", {}).get("X-Error-Message", "")
    )
    if status == 401 and "credentials" in message:
        return HubError(
            f"{hub_name()} does not know your token",
            hint="log in again (hf auth login), or correct or unset HF_TOKEN",
            status=status,
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointNotFound(
            f"there is no repository {hub.repo} on the hub, or it is private",
            reference=str(hub),
            tried=[str(hub)],
            hint="check its spelling; for a private one, log in (hf auth login) or set HF_TOKEN",
        )
    answers = {
        401: (f"wants to know who you are before it gives {hub}", "log in: hf auth login"),
        403: (f"does not let you have {hub}", f"look at {page} for what it asks of you"),
        404: (f"does not have a file of {hub}", "its owner may just have changed it: try again"),
        429: ("says this machine asks too often", f"wait some minutes, then {GOES_ON}"),
    }
    words, hint = answers.get(
        status, (f"could not answer for {hub}", f"wait some minutes, then {GOES_ON}")
    )
    return HubError(f"{hub_name()} {words} (status {status})", hint=hint, status=status)


def _unreached(hub: HubReference, error: BaseException) -> HubError:
    kinds = _kinds(error)
    proxy = next((name for name in PROXIES if os.environ.get(name)), None)
    if "ProxyError" in kinds or (proxy and "ConnectError" in kinds):
        return HubError(
            f"the proxy named by {proxy or 'your settings'} does not lead to {hub_name()} "
            f"({_first_line(error)})",
            hint=f"correct or unset {proxy or 'the proxy'}; NO_PROXY names hosts to reach without "
            "it",
        )
    if "TimeoutException" in kinds or isinstance(error, TimeoutError):
        return HubError(
            f"{hub_name()} stopped answering while {hub} was fetched",
            hint=f"{GOES_ON}; on a slow line, HF_HUB_DOWNLOAD_TIMEOUT=60 waits longer",
        )
    if "ConnectError" in kinds or isinstance(error, ConnectionError):
        return HubError(
            f"{hub_name()} cannot be reached ({_first_line(error)})",
            hint="check the network, and HF_ENDPOINT where a mirror is used; then run the same "
            "command again",
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return HubError(
            f"{hub} cannot be kept in {error.filename or 'the cache'}: {error.strerror}",
            hint="name a folder that can be written: HF_HOME for the cache, or --to DIR",
        )
    return HubError(
        f"{hub} could not be fetched ({_first_line(error)})",
        hint=f"check the network and the free disk space, then {GOES_ON}",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _kinds(error: BaseException) -> set[str]:
    """Name an error's classes: huggingface_hub uses httpx or httpx2, which name them alike."""
    return {base.__name__ for base in type(error).__mro__}
