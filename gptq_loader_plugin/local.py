"""List the GPTQ checkpoints of this machine: those of the models directories and the hub's cache.

Only names, config files and headers are looked at, so that a list of hundreds takes a moment. A
checkpoint may be in the list and still turn out to be damaged: `inspect` says what it is.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gptq_loader_plugin.checkpoint.config import read_stored_config
from gptq_loader_plugin.checkpoint.headers import find_weight_files, read_headers
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.reference import WEIGHT_SUFFIXES, models_folders

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

__all__ = ["LocalModel", "local_models"]


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
    source: Literal["models directory", "Hugging Face cache"]
    size_bytes: int


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
    found: dict[str, LocalModel] = {}
    for folder in models_folders(environ):
        for name, path in _folders(folder):
            if name not in found and _is_gptq(path):
                found[name] = LocalModel(name, path, "models directory", _weight_bytes(path))
    listed = sorted(found.values(), key=lambda it: it.name.casefold())
    if cache:
        cached = [
            LocalModel(name, path, "Hugging Face cache", _weight_bytes(path))
            for name, path in _cached()
            if name not in found and _is_gptq(path)
        ]
        listed += sorted(cached, key=lambda it: it.name.casefold())
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
        return sorted(it for it in folder.iterdir() if it.is_dir() and it.name[0] != ".")
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
        return any(it.suffix in WEIGHT_SUFFIXES for it in folder.iterdir())
    except OSError:
        return False


def _weight_bytes(folder: Path) -> int:
    files = (it for it in folder.iterdir() if it.suffix in WEIGHT_SUFFIXES)
    return sum(it.stat().st_size for it in files if it.exists())


def _is_gptq(folder: Path) -> bool:
    """Tell whether a folder's config or tensors are GPTQ's; the loader will say what is wrong.

    Pickles are not opened for a list: without a config, their names must say it.
    """
    try:
        stored, _ = read_stored_config(folder)
        if stored.quant_method is not None or stored.bits is not None:
            return True
        files = find_weight_files(folder)
        if all(it.suffix == ".safetensors" for it in files):
            return any(name.endswith(".qweight") for name in read_headers(files))
    except GPTQLoaderError:
        return (folder / "quantize_config.json").is_file()
    return any("bit" in it.stem.lower() or "gptq" in it.stem.lower() for it in files)
