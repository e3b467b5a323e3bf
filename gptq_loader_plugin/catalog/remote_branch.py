"""Look into one branch without fetching it: its config files, and the headers of its weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.catalog.engines.facts import gather_facts
from gptq_loader_plugin.catalog.engines.judge import ask_engines
from gptq_loader_plugin.catalog.exllama import ask_exllama
from gptq_loader_plugin.catalog.fit import Fit, check_fit
from gptq_loader_plugin.checkpoint.config import CONFIG_FILES, read_stored_config
from gptq_loader_plugin.checkpoint.detect import detect
from gptq_loader_plugin.checkpoint.headers import read_safetensors_header
from gptq_loader_plugin.checkpoint.outline import outline
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.checkpoint.weight_files import find_weight_files
from gptq_loader_plugin.errors import CheckpointError, GPTQLoaderError, UnsupportedFormat
from gptq_loader_plugin.hub.cache import RepoCache, cached_folder
from gptq_loader_plugin.hub.error_messages import explained
from gptq_loader_plugin.hub.fetch import free_bytes
from gptq_loader_plugin.hub.remote import look_up, read
from gptq_loader_plugin.hub.workers import Cancelled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.catalog.engines.engine import Answer
    from gptq_loader_plugin.catalog.exllama import ExllamaReport
    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.hub.hub_reference import HubReference
    from gptq_loader_plugin.hub.remote import RemoteBranch, RemoteFile
    from gptq_loader_plugin.hub.workers import Stop
    from gptq_loader_plugin.kernel import Kernel

__all__ = [
    "FACTS",
    "PICKLE",
    "BranchContents",
    "FitQuestion",
    "inspect_branch",
    "outline_branch",
]

PICKLE = "a pickle (.pt, .bin) is not looked into before it is here"
FIRST = 100_000  # bytes asked for first: the whole header of a model of 30 blocks
FACTS = ("bits", "group_size", "desc_act", "damp_percent", "dataset", "seq_len")


@dataclass(frozen=True, slots=True)
class FitQuestion:
    """What every branch is asked with."""

    device: Device
    kernels: Sequence[Kernel]
    context: int
    cache: Path


@dataclass(frozen=True, slots=True)
class BranchContents:
    """What a branch itself tells."""

    remote: RemoteBranch | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    exllama: ExllamaReport | None = None
    engines: tuple[Answer, ...] = ()
    fit: Fit | None = None
    is_gptq: bool | None = None
    error: str = ""


def inspect_branch(hub: HubReference, question: FitQuestion, stop: Stop) -> BranchContents:
    """Read one branch; what it is not, or what failed, is in the answer."""
    try:
        remote = look_up(hub, stop)
    except Cancelled:
        raise
    except Exception as error:  # noqa: BLE001 - one branch's failure is not the others'
        return BranchContents(error=_words(hub, error))
    if not remote.weight_files:
        return BranchContents(
            remote, is_gptq=False, error="it holds no weights that this package reads"
        )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            return _open(remote, folder, question, stop)
        except Cancelled:
            raise
        except UnsupportedFormat as error:
            return BranchContents(remote, is_gptq=False, error=_words(hub, error))
        except Exception as error:  # noqa: BLE001 - one branch's failure is not the others'
            return BranchContents(remote, error=_words(hub, error))


def _open(remote: RemoteBranch, folder: Path, question: FitQuestion, stop: Stop) -> BranchContents:
    """Read a branch's config files and the headers of its weights."""
    checkpoint = outline_branch(remote, folder, stop)
    stored, _ = read_stored_config(folder)
    if checkpoint is None:
        facts = {
            name: value for name in FACTS if (value := getattr(stored, name, None)) is not None
        }
        return BranchContents(
            remote,
            facts=facts,
            sources=dict(stored.sources),
            fit=Fit(fits=None, reason=PICKLE),
            is_gptq=True if detect(folder).is_gptq else None,
        )
    cache = RepoCache(question.cache, remote.hub.repo)
    missing = sum(file.size for file in remote.files if not cache.has(file))
    fit = check_fit(
        checkpoint,
        question.device,
        question.kernels,
        context=question.context,
        disk=(missing, free_bytes(question.cache)),
    )
    return BranchContents(
        remote,
        facts=_facts(checkpoint, order_is_known=stored.desc_act is not None),
        sources=checkpoint.config.sources,
        exllama=_exllama(remote, checkpoint, question),
        engines=ask_engines(gather_facts(checkpoint)),
        fit=fit,
        is_gptq=True,
    )


def _exllama(remote: RemoteBranch, checkpoint: Checkpoint, question: FitQuestion) -> ExllamaReport:
    """Ask ExLlama about a branch's own files where they are here, or else about its outline."""
    here = cached_folder(replace(remote.hub, branch=remote.commit))
    if here is not None:
        with suppress(GPTQLoaderError, OSError):
            return ask_exllama(open_checkpoint(here), question.kernels)
    return ask_exllama(checkpoint, question.kernels, zeros_are_read=False)


def outline_branch(remote: RemoteBranch, folder: Path, stop: Stop) -> Checkpoint | None:
    """Describe a branch by its config files and the headers of its weights; None for a pickle.

    Args:
        remote: the branch.
        folder: where its config files are put, and files of its weights' names.
        stop: looked at between requests.

    Raises:
        CheckpointError: its files do not make a GPTQ checkpoint.
    """
    for file in remote.files:
        if file.name in (*CONFIG_FILES, "config.json") or file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(read(file, stop))
    for file in remote.weight_files:
        (folder / file.name).touch()  # for its name: nothing reads it
    stored, _ = read_stored_config(folder)
    by_name = {file.name: file for file in remote.weight_files}
    headers: dict[str, list[TensorInfo]] = {}

    def tensors(name: str) -> list[TensorInfo]:
        if name not in headers:
            headers[name] = _headers(by_name[name], folder, stop)
        return headers[name]

    def is_packed(paths: list[Path]) -> bool:
        return any(
            header.name.endswith(".qweight") for path in paths for header in tensors(path.name)
        )

    weights = find_weight_files(folder, base_name=stored.model_file_base_name, is_packed=is_packed)
    files = [by_name[path.name] for path in weights.files]
    if any(not file.name.endswith(".safetensors") for file in files):
        return None
    size = sum(file.size for file in files)
    all_headers = {header.name: header for file in files for header in tensors(file.name)}
    return outline(all_headers, stored, folder=folder, size_bytes=size)


def _headers(file: RemoteFile, folder: Path, stop: Stop) -> list[TensorInfo]:
    """Read the header of a safetensors file by range."""
    first = read(file, stop, count=FIRST)
    length = 8 + int.from_bytes(first[:8], "little")
    if FIRST < length <= file.size:
        first += read(file, stop, begin=len(first), count=length - len(first))
    return read_safetensors_header(BytesIO(first).read, file=folder / file.name, size=file.size)


def _facts(checkpoint: Checkpoint, *, order_is_known: bool) -> dict[str, Any]:
    config = checkpoint.config
    extra = config.model_extra or {}
    facts = {
        "bits": config.bits,
        "group_size": config.group_size,
        "desc_act": config.desc_act if order_is_known else None,
        "damp_percent": config.damp_percent,
        "dataset": extra.get("dataset"),
        "seq_len": extra.get("model_seqlen") or extra.get("seq_len"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _words(hub: HubReference, error: Exception) -> str:
    """Describe what failed, without the folder that only this list knows."""
    ours = error if isinstance(error, GPTQLoaderError) else explained(hub, error)
    if isinstance(ours, CheckpointError):
        return ours.message.removeprefix(f"{ours.path}: ")
    return ours.message
