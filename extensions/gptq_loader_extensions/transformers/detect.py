"""Detect whether `from_pretrained` was given a GPTQ checkpoint, and fetch it.

Anything else is left to transformers, and costs a look at files that it would read itself.
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

__all__ = ["CheckpointSource", "fetch", "find_checkpoint"]

OTHER_SOURCES = ("gguf_file", "state_dict")
STOCK_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A GPTQ checkpoint, on this machine or on the hub.

    Attributes:
        name: the reference that the user typed.
        subfolder: the folder in it, or "".
        folder: where it is on this machine; None where it must be fetched first.
        known: whether transformers also recognises it as GPTQ.
        hub: the options that say where on the hub it is, and how to get it.
        translated: its config.json in the names of a transformers class, where it has others.
    """

    name: str
    subfolder: str
    folder: Path | None
    known: bool
    hub: Mapping[str, Any]
    translated: dict[str, Any] | None = None


def find_checkpoint(name: object, kwargs: Mapping[str, Any]) -> CheckpointSource | None:
    """Return the GPTQ checkpoint that `from_pretrained(name, **kwargs)` names; None for any other.

    Raises:
        OSError: a file of the hub cannot be fetched, as transformers raises it.
        CheckpointError: config.json lacks what is needed to build the model.
    """
    if name is None or any(kwargs.get(option) is not None for option in OTHER_SOURCES):
        return None
    subfolder = kwargs.get("subfolder") or ""
    hub = {option: kwargs[option] for option in HUB_OPTIONS if kwargs.get(option) is not None}
    source = CheckpointSource(str(name), subfolder, None, known=True, hub=hub)
    folder = Path(str(name)) / subfolder
    if Path(str(name)).is_dir():
        source = replace(source, folder=folder)
    config = _read_object(source, "config.json")
    if config is None:
        return None
    quantization = config.get("quantization_config")
    detection: Detection | None = None
    if isinstance(quantization, dict) and quantization:
        detection = detect_by_configs([("config.json", {"bits": 0, **quantization})])
    else:
        source = replace(source, known=False)
        stored = ((file, _read_object(source, file) or {}) for file in CONFIG_FILES)
        detection = detect_by_configs(stored)
    if detection is None and source.folder is not None and not _is_stock(source.folder):
        detection = detect(source.folder, open_pickles=True)
    if detection is None or not detection.is_gptq:
        return None
    return _with_translation(source, config)


def fetch(source: CheckpointSource) -> Path:
    """Return the checkpoint's folder, downloaded into the hub's cache where it is not here."""
    if source.folder is not None:
        return source.folder
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options = {key: value for key, value in source.hub.items() if key != "proxies"}
    inside = f"{source.subfolder}/" if source.subfolder else ""
    patterns: list[str] | None = None
    if not (options.get("local_files_only") or constants.HF_HUB_OFFLINE):
        api = HfApi(token=options.get("token"))
        try:
            names = api.list_repo_files(source.name, revision=options.get("revision"))
        except Exception as error:  # noqa: BLE001 - whatever a network raises
            try:  # without a network the cache is used, as transformers does
                folder = snapshot_download(source.name, **{**options, "local_files_only": True})
            except LocalEntryNotFoundError:
                raise error from None
            return Path(folder) / source.subfolder
        safe = any(file.startswith(inside) and file.endswith(".safetensors") for file in names)
        kinds = (*SMALL_FILES, *(WEIGHT_FILES if safe else PICKLE_FILES))
        patterns = [f"{inside}{kind}" for kind in kinds]
    return Path(
        snapshot_download(source.name, allow_patterns=patterns, **options), source.subfolder
    )


def _with_translation(source: CheckpointSource, config: dict[str, Any]) -> CheckpointSource:
    path = Path(source.name) / source.subfolder / "config.json"
    return replace(source, translated=translate_config(config, path))


def _read_object(source: CheckpointSource, file: str) -> dict[str, Any] | None:
    """Read a JSON file of the checkpoint; None where it is absent or no JSON object."""
    if source.folder is not None:
        path: Path | None = source.folder / file
    else:
        path = _fetch_small_file(source, file)
    if path is None or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        return None  # transformers reports what is wrong with it
    return content if isinstance(content, dict) else None


def _fetch_small_file(source: CheckpointSource, file: str) -> Path | None:
    """Have transformers fetch a small file; None where its cache or the hub has none."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        source.name,
        file,
        subfolder=source.subfolder,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
        **source.hub,
    )
    return None if path is None else Path(path)


def _is_stock(folder: Path) -> bool:
    """Return whether a folder's pickles are named as transformers names plain weights."""
    return not any(folder.glob("*.safetensors")) and any(
        (folder / name).is_file() for name in STOCK_PICKLES
    )
