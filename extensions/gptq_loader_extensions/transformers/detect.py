"""Say whether what `from_pretrained` was given is a GPTQ checkpoint, and fetch it.

What is not one is left to transformers, and costs a look at files that it would read itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.architectures.translate import translate_config
from gptq_loader_plugin.checkpoint.config import CONFIG_FILES
from gptq_loader_plugin.checkpoint.detect import detect, detect_by_configs
from gptq_loader_plugin.hub.remote import PICKLE_FILES, SMALL_FILES, WEIGHT_FILES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gptq_loader_plugin.checkpoint.detect import Detection

__all__ = ["Found", "fetch", "find_checkpoint"]

OTHER_SOURCES = ("gguf_file", "state_dict")
STOCK_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


@dataclass(frozen=True, slots=True)
class Found:
    """A GPTQ checkpoint, on this machine or on the hub.

    Attributes:
        name: what the user typed.
        subfolder: the folder in it, or "".
        folder: where it is on this machine; None where it must be fetched first.
        known: whether transformers too would know it for GPTQ.
        hub: the options that say where on the hub it is, and how to get it.
        translated: what its config.json says in transformers' words, where it has others.
    """

    name: str
    subfolder: str
    folder: Path | None
    known: bool
    hub: Mapping[str, Any]
    translated: dict[str, Any] | None = None


def find_checkpoint(name: object, kwargs: Mapping[str, Any]) -> Found | None:
    """Find out whether `from_pretrained(name, **kwargs)` names a GPTQ checkpoint.

    Raises:
        OSError: what transformers raises where a file of the hub cannot be had.
        CheckpointError: it is one, and config.json lacks what it takes to build its model.
    """
    if name is None or any(kwargs.get(it) is not None for it in OTHER_SOURCES):
        return None
    subfolder = kwargs.get("subfolder") or ""
    hub = {it: kwargs[it] for it in HUB_OPTIONS if kwargs.get(it) is not None}
    found = Found(str(name), subfolder, None, known=True, hub=hub)
    folder = Path(str(name)) / subfolder
    if Path(str(name)).is_dir():
        found = replace(found, folder=folder)
    config = _table(found, "config.json")
    if config is None:
        return None
    quantization = config.get("quantization_config")
    detection: Detection | None = None
    if isinstance(quantization, dict) and quantization:
        detection = detect_by_configs([("config.json", {"bits": 0, **quantization})])
    else:
        found = replace(found, known=False)
        stored = ((file, _table(found, file) or {}) for file in CONFIG_FILES)
        detection = detect_by_configs(stored)
    if detection is None and found.folder is not None and not _is_stock(found.folder):
        detection = detect(found.folder, open_pickles=True)
    if detection is None or not detection.is_gptq:
        return None
    return _translated(found, config)


def fetch(found: Found) -> Path:
    """Give the checkpoint's folder, downloaded into the hub's cache where it is not here."""
    if found.folder is not None:
        return found.folder
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options = {key: value for key, value in found.hub.items() if key != "proxies"}
    inside = f"{found.subfolder}/" if found.subfolder else ""
    patterns: list[str] | None = None
    if not (options.get("local_files_only") or constants.HF_HUB_OFFLINE):
        api = HfApi(token=options.get("token"))
        try:
            names = api.list_repo_files(found.name, revision=options.get("revision"))
        except Exception as error:  # noqa: BLE001 - whatever a network raises
            try:  # without a network, what is in the cache will do, as it does for transformers
                folder = snapshot_download(found.name, **{**options, "local_files_only": True})
            except LocalEntryNotFoundError:
                raise error from None
            return Path(folder) / found.subfolder
        safe = any(it.startswith(inside) and it.endswith(".safetensors") for it in names)
        kinds = (*SMALL_FILES, *(WEIGHT_FILES if safe else PICKLE_FILES))
        patterns = [f"{inside}{it}" for it in kinds]
    return Path(snapshot_download(found.name, allow_patterns=patterns, **options), found.subfolder)


def _translated(found: Found, config: dict[str, Any]) -> Found:
    path = Path(found.name) / found.subfolder / "config.json"
    return replace(found, translated=translate_config(config, path))


def _table(found: Found, file: str) -> dict[str, Any] | None:
    """Read a JSON file of the checkpoint; None where there is none, or it holds something else."""
    if found.folder is not None:
        path: Path | None = found.folder / file
    else:
        path = _from_hub(found, file)
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None  # transformers says what is wrong with it
    return content if isinstance(content, dict) else None


def _from_hub(found: Found, file: str) -> Path | None:
    """Have transformers fetch a small file, or know from its cache that there is none."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        found.name,
        file,
        subfolder=found.subfolder,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **found.hub,
    )
    return None if path is None else Path(path)


def _is_stock(folder: Path) -> bool:
    """Whether a folder's pickles have the names that transformers writes: of no use to open."""
    return not any(folder.glob("*.safetensors")) and any(
        (folder / name).is_file() for name in STOCK_PICKLES
    )
