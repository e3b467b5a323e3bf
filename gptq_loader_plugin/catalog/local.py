"""List the GPTQ checkpoints of this machine: those of the models directories and the hub's cache.

Only names, config files and headers are looked at, so that a list of hundreds takes a moment. What
headers cannot tell, such as whether act-order is what the config says, `inspect` does.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gptq_loader_plugin.catalog.fit import Fit, check_fit
from gptq_loader_plugin.checkpoint.config import read_stored_config
from gptq_loader_plugin.checkpoint.detect import detect
from gptq_loader_plugin.checkpoint.headers import read_headers
from gptq_loader_plugin.checkpoint.outline import outline
from gptq_loader_plugin.checkpoint.weight_files import WEIGHT_SUFFIXES, find_weight_files
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.reference import models_folders

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import Kernel

__all__ = ["LocalModel", "LocalReport", "local_models", "report_model"]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A checkpoint that is on this machine.

    Attributes:
        name: what a user types to load it: a folder of a models directory, or `owner/repo:branch`.
        path: its folder.
        source: where it lies.
        size_bytes: its weight files' bytes.
    """

    name: str
    path: Path
    source: Literal["models directory", "Hugging Face cache", "demo"]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LocalReport:
    """What the config and the headers of a checkpoint on this machine tell; None where nothing.

    Attributes:
        model: the checkpoint.
        bits: the width of most layers' codes.
        group_size: input rows that share a scale, or -1.
        desc_act: act-order.
        layers: how many layers are quantised.
        fit: whether it fits this machine.
        error: what is wrong with it, in words.
        hint: what to do about it.
    """

    model: LocalModel
    bits: int | None = None
    group_size: int | None = None
    desc_act: bool | None = None
    layers: int | None = None
    fit: Fit = field(default_factory=lambda: Fit(fits=None, reason="it cannot be read"))
    error: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data, for `models --json`."""
        data = asdict(self)
        about = data.pop("model")
        return {**about, "path": str(about["path"]), **data}


def report_model(
    model: LocalModel, device: Device, kernels: Sequence[Kernel], *, context: int = 4096
) -> LocalReport:
    """Read a checkpoint's config and headers; one that is damaged has its error in the report.

    Args:
        model: one of `local_models`.
        device: where it would run.
        kernels: the kernels to ask.
        context: the tokens of context to keep room for.
    """
    try:
        stored, _ = read_stored_config(model.path)
        files = find_weight_files(model.path, base_name=stored.model_file_base_name).files
        if any(file.suffix != ".safetensors" for file in files):
            return LocalReport(
                model,
                bits=stored.bits,
                group_size=stored.group_size,
                desc_act=stored.desc_act,
                fit=Fit(fits=None, reason="a pickle (.pt, .bin) is not opened for a list"),
            )
        headers = read_headers(files)
        checkpoint = outline(headers, stored, folder=model.path, size_bytes=model.size_bytes)
        fit = check_fit(checkpoint, device, kernels, context=context)
    except GPTQLoaderError as error:
        return LocalReport(model, error=error.message, hint=error.hint)
    except OSError as error:
        why = f"{model.path}: {error.strerror or error}"
        return LocalReport(model, error=why, hint="check that folder and its permissions")
    return LocalReport(
        model,
        bits=checkpoint.config.bits,
        group_size=checkpoint.config.group_size,
        desc_act=checkpoint.config.desc_act,
        layers=len(checkpoint.layers),
        fit=fit,
    )


def local_models(
    *, cache: bool = True, environ: Mapping[str, str] = os.environ
) -> list[LocalModel]:
    """List the GPTQ checkpoints of the models directories, then those of the hub's cache, by name.

    Of two with one name, the first is listed: it is the one that the name loads. Folders of other
    models are left out.

    Args:
        cache: whether to look into the hub's cache too (`HF_HUB_CACHE`, `HF_HOME`).
        environ: where `GPTQ_LOADER_MODELS` is looked up.
    """
    by_name: dict[str, LocalModel] = {}
    for folder in models_folders(environ):
        for name, path in _folders(folder):
            if name not in by_name and detect(path).is_gptq:
                by_name[name] = LocalModel(name, path, "models directory", _weight_bytes(path))
    listed = sorted(by_name.values(), key=lambda model: model.name.casefold())
    if cache:
        cached = [
            LocalModel(name, path, "Hugging Face cache", _weight_bytes(path))
            for name, path in _cached()
            if name not in by_name and detect(path).is_gptq
        ]
        listed += sorted(cached, key=lambda model: model.name.casefold())
    return listed


def _folders(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name the folders with weights: those directly inside, and `owner/name` below a folder."""
    for path in _subfolders(folder):
        if _has_weights(path):
            yield path.name, path
            continue
        for inner in _subfolders(path):
            if _has_weights(inner):
                yield f"{path.name}/{inner.name}", inner


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError:  # there is none, or it may not be read
        return []


def _cached() -> Iterator[tuple[str, Path]]:
    """Name the snapshots of the hub's cache: by branch, or by commit where no branch has it."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return
    for repo in cache.repos:
        if repo.repo_type != "model":
            continue
        for revision in repo.revisions:
            for branch in revision.refs or (revision.commit_hash,):
                name = repo.repo_id if branch == "main" else f"{repo.repo_id}:{branch}"
                if _has_weights(revision.snapshot_path):
                    yield name, revision.snapshot_path


def _has_weights(folder: Path) -> bool:
    try:
        return any(path.suffix in WEIGHT_SUFFIXES for path in folder.iterdir())
    except OSError:
        return False


def _weight_bytes(folder: Path) -> int:
    files = (path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    return sum(file.stat().st_size for file in files if file.exists())
