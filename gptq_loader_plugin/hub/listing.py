"""List a repository's branches as its model card does, and say which fit this machine.

Of a branch's weights only the headers are read, by range. A branch that cannot be read keeps its
line, with what the card and its name tell.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import CONFIG_FILES, read_stored_config
from gptq_loader_plugin.checkpoint.headers import find_weight_files, read_safetensors_header
from gptq_loader_plugin.checkpoint.outline import outline
from gptq_loader_plugin.errors import (
    CheckpointError,
    DownloadCancelled,
    GPTQLoaderError,
    UnsupportedFormat,
)
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.exllama import ask_exllama
from gptq_loader_plugin.fitting import Fit, check_fit
from gptq_loader_plugin.hub.cache import RepoCache, cached_folder
from gptq_loader_plugin.hub.card_table import CardRow, read_branch_name, read_card_table
from gptq_loader_plugin.hub.fetch import LOOK_UP_LIMIT, free_bytes
from gptq_loader_plugin.hub.remote import list_names, look_up, read
from gptq_loader_plugin.hub.words import explained
from gptq_loader_plugin.hub.workers import Cancelled, run_jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_plugin.checkpoint.headers import TensorInfo
    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.exllama import ExllamaReport
    from gptq_loader_plugin.hub.remote import RemoteBranch, RemoteFile
    from gptq_loader_plugin.hub.workers import Stop
    from gptq_loader_plugin.kernel import Kernel
    from gptq_loader_plugin.reference import HubReference

__all__ = ["BranchReport", "RepoReport", "list_branches"]

WORKERS = 4  # branches at a time: few enough for a hub to take it kindly
FIRST = 100_000  # bytes asked for first: the header of a model of 10 billion parameters
FACTS = ("bits", "group_size", "desc_act", "damp_percent", "dataset", "seq_len")


@dataclass(frozen=True, slots=True)
class BranchReport:
    """One branch; None where nothing tells.

    Attributes:
        branch: its name.
        commit: the commit it is at.
        is_gptq: whether it is a GPTQ checkpoint.
        bits: the width of most layers' codes.
        group_size: input rows that share a scale, or -1.
        desc_act: act-order.
        damp_percent: the damping GPTQ used.
        dataset: what it was calibrated on.
        seq_len: the tokens of a calibration sample.
        size_bytes: its weights.
        download_bytes: all that a download fetches.
        exllama: whether ExLlama could run it.
        desc: the card's words.
        fit: whether it fits this machine.
        here: whether it is on this machine.
        sources: where each fact came from.
        warnings: what a user should know.
        error: why it could not be read, or what else it is.
    """

    branch: str
    commit: str
    is_gptq: bool | None = None
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    damp_percent: float | None = None
    dataset: str | None = None
    seq_len: int | None = None
    size_bytes: int | None = None
    download_bytes: int | None = None
    exllama: ExllamaReport | None = None
    desc: str | None = None
    fit: Fit = field(default_factory=lambda: Fit(fits=None, reason="it could not be read"))
    here: bool = False
    sources: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True)
class RepoReport:
    """A repository's branches.

    Attributes:
        repo: "owner/name".
        license: what its model card says, or "".
        gated: whether its owner lets people in one by one.
        device: where they would run.
        context: the tokens of context to keep room for.
        free_bytes: the bytes free on the cache's disk.
        branches: main first, then in the order of the card.
        warnings: what a user should know.
    """

    repo: str
    license: str
    gated: bool
    device: str
    context: int
    free_bytes: int
    branches: tuple[BranchReport, ...]
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Give the report as plain data, for `branches --json`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Asker:
    """What every branch is asked with."""

    device: Device
    kernels: Sequence[Kernel]
    context: int
    cache: Path


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a branch itself tells."""

    remote: RemoteBranch | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    exllama: ExllamaReport | None = None
    fit: Fit | None = None
    is_gptq: bool | None = None
    error: str = ""


def list_branches(
    hub: HubReference,
    *,
    device: Device,
    kernels: Sequence[Kernel],
    context: int = 4096,
    alone: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> RepoReport:
    """List a repository's branches.

    Args:
        hub: the repository.
        device: where they would run.
        kernels: the kernels to ask.
        context: the tokens of context to keep room for.
        alone: whether to list the branch that `hub` names alone.
        progress: told how many branches are read.
        cancelled: asked all the time; once it says yes this ends.

    Raises:
        CheckpointNotFound: there is no such repository or branch.
        DownloadCancelled: `cancelled` said yes.
        HubError: the hub could not be reached, or refused.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    asker = _Asker(device, kernels, context, cache)
    try:
        names = run_jobs(
            [partial(_names, hub, alone=alone)], workers=1, cancelled=cancelled, limit=LOOK_UP_LIMIT
        )[0]
        seen, card, license_, warnings = _ask_all(hub, names, asker, progress, cancelled)
    except Cancelled:
        raise DownloadCancelled(f"the list of {hub.repo} was stopped", hint="ask again") from None
    except Exception as error:
        raise explained(hub, error) from error
    order = {name: at for at, name in enumerate(dict.fromkeys(("main", *card)))}
    reports = [_report(replace(hub, branch=it), names[it], seen[it], card.get(it)) for it in names]
    reports.sort(key=lambda it: (order.get(it.branch, len(order)), it.branch))
    return RepoReport(
        repo=hub.repo,
        license=license_,
        gated=any(it.remote.gated for it in seen.values() if it.remote),
        device=str(device),
        context=context,
        free_bytes=free_bytes(cache),
        branches=tuple(reports),
        warnings=warnings,
    )


def _names(hub: HubReference, stop: Stop, *, alone: bool) -> dict[str, str]:
    """List the branches to read, each with its commit."""
    if alone:
        return {hub.branch: look_up(hub, stop).commit}
    return list_names(hub.repo, stop)


def _ask_all(
    hub: HubReference,
    names: dict[str, str],
    asker: _Asker,
    progress: Callable[[Progress], None] | None,
    cancelled: Callable[[], bool] | None,
) -> tuple[dict[str, _Seen], dict[str, CardRow], str, tuple[str, ...]]:
    """Read every branch and the card, a few at a time; what fails is in its `_Seen`."""
    seen: dict[str, _Seen] = {}
    told = -1

    def look() -> None:
        nonlocal told
        if progress is not None and told != (told := len(seen)):
            progress(Progress("branches", told, len(names), "branches", hub.repo))

    def branch(name: str, stop: Stop) -> None:
        seen[name] = _see(replace(hub, branch=name), asker, stop)

    card: dict[str, CardRow] = {}
    said: list[str] = []
    warnings: list[str] = []

    def read_card(stop: Stop) -> None:
        try:
            remote = look_up(replace(hub, branch="main"), stop)
            said.append(remote.license)
            file = remote.file("README.md")
            if file is not None:
                card.update(read_card_table(read(file, stop).decode("utf-8", errors="replace")))
        except Cancelled:
            raise
        except Exception as error:  # noqa: BLE001 - the branches tell most of what the card does
            warnings.append(f"the model card cannot be read: {explained(hub, error).message}")

    jobs: list[Callable[[Stop], None]] = [read_card, *(partial(branch, it) for it in names)]
    run_jobs(
        jobs,
        workers=WORKERS,
        cancelled=cancelled,
        look=look,
    )
    return seen, card, said[0] if said else "", tuple(warnings)


def _see(hub: HubReference, asker: _Asker, stop: Stop) -> _Seen:
    """Read one branch; what it is not, or what failed, is in the answer."""
    try:
        remote = look_up(hub, stop)
    except Cancelled:
        raise
    except Exception as error:  # noqa: BLE001 - one branch's failure is not the others'
        return _Seen(error=_words(hub, error))
    if not remote.weight_files:
        return _Seen(remote, is_gptq=False, error="it holds no weights that this package reads")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            return _open(remote, folder, asker, stop)
        except Cancelled:
            raise
        except UnsupportedFormat as error:
            return _Seen(remote, is_gptq=False, error=_words(hub, error))
        except Exception as error:  # noqa: BLE001 - one branch's failure is not the others'
            return _Seen(remote, error=_words(hub, error))


def _open(remote: RemoteBranch, folder: Path, asker: _Asker, stop: Stop) -> _Seen:
    """Read a branch's config files and the headers of its weights."""
    for file in remote.files:
        if file.name in (*CONFIG_FILES, "config.json") or file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(read(file, stop))
    for file in remote.weight_files:
        (folder / file.name).touch()  # for its name: nothing reads it
    stored, _ = read_stored_config(folder)
    found = find_weight_files(folder, base_name=stored.model_file_base_name)
    files = [it for it in remote.weight_files if it.name in {path.name for path in found}]
    if any(not it.name.endswith(".safetensors") for it in files):
        told = {name: value for name in FACTS if (value := getattr(stored, name, None)) is not None}
        why = "a pickle (.pt, .bin) is not looked into before it is here"
        return _Seen(
            remote,
            facts=told,
            sources=dict(stored.sources),
            fit=Fit(fits=None, reason=why),
            is_gptq=True if stored.bits is not None else None,
        )
    headers: dict[str, TensorInfo] = {}
    for file in files:
        headers |= {it.name: it for it in _headers(file, folder, stop)}
    size = sum(it.size for it in files)
    checkpoint = outline(headers, stored, folder=folder, size_bytes=size)
    cache = RepoCache(asker.cache, remote.hub.repo)
    missing = sum(it.size for it in remote.files if not cache.has(it))
    fit = check_fit(
        checkpoint,
        asker.device,
        asker.kernels,
        context=asker.context,
        disk=(missing, free_bytes(asker.cache)),
    )
    return _Seen(
        remote,
        facts=_facts(checkpoint, told_order=stored.desc_act is not None),
        sources=checkpoint.config.sources,
        exllama=ask_exllama(checkpoint, asker.kernels),
        fit=fit,
        is_gptq=True,
    )


def _headers(file: RemoteFile, folder: Path, stop: Stop) -> list[TensorInfo]:
    """Read the header of a safetensors file by range."""
    first = read(file, stop, count=FIRST)
    length = 8 + int.from_bytes(first[:8], "little")
    if FIRST < length <= file.size:
        first += read(file, stop, begin=len(first), count=length - len(first))
    return read_safetensors_header(BytesIO(first).read, file=folder / file.name, size=file.size)


def _facts(checkpoint: Checkpoint, *, told_order: bool) -> dict[str, Any]:
    config = checkpoint.config
    extra = config.model_extra or {}
    facts = {
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.desc_act if told_order else None,
        "damp_percent": config.damp_percent,
        "dataset": extra.get("dataset"),
        "seq_len": extra.get("model_seqlen") or extra.get("seq_len"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _report(hub: HubReference, commit: str, seen: _Seen, card: CardRow | None) -> BranchReport:
    """Put together what the branch, the card and the name tell; the branch itself wins."""
    facts, sources = dict(seen.facts), {it: seen.sources.get(it, "") for it in seen.facts}
    warnings = []
    for row, source in ((card, "model card"), (read_branch_name(hub.branch), "branch name")):
        for fact in FACTS:
            value = getattr(row, fact, None)
            if value is None:
                continue
            if fact not in facts:
                facts[fact], sources[fact] = value, source
            elif facts[fact] != value and fact in ("bits", "group_size", "desc_act"):
                warnings.append(f"the {source} says {_fact(fact, value)}, and it is not so")
    remote = seen.remote
    return BranchReport(
        branch=hub.branch,
        commit=commit,
        is_gptq=seen.is_gptq,
        **(facts if seen.is_gptq is not False else {}),
        size_bytes=sum(it.size for it in remote.weight_files) if remote else None,
        download_bytes=remote.size if remote else None,
        exllama=seen.exllama,
        desc=card.desc if card else None,
        fit=seen.fit or Fit(fits=None, reason=seen.error or "it could not be read"),
        here=cached_folder(replace(hub, branch=commit)) is not None,
        sources={it: source for it, source in sources.items() if source},
        warnings=tuple(warnings),
        error=seen.error,
    )


def _fact(name: str, value: object) -> str:
    if name == "bits":
        return f"{value}-bit"
    if name == "group_size":
        return "no groups" if value == -1 else f"groups of {value}"
    return "act-order" if value else "no act-order"


def _words(hub: HubReference, error: Exception) -> str:
    """Say what failed, without the folder that only this list knows."""
    ours = error if isinstance(error, GPTQLoaderError) else explained(hub, error)
    if isinstance(ours, CheckpointError):
        return ours.message.removeprefix(f"{ours.path}: ")
    return ours.message
