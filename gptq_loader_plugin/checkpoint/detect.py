"""Whether a folder holds a GPTQ checkpoint, quickly: by its configs, else by its tensors' names.

One answer for every list and every host. A checkpoint that is damaged is one all the same: loading
it says what is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import CONFIG_FILES, method_of, read_json
from gptq_loader_plugin.checkpoint.headers import read_headers
from gptq_loader_plugin.checkpoint.weight_files import GPTQ_NAME, find_weight_files
from gptq_loader_plugin.errors import ConfigInvalid, GPTQLoaderError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

__all__ = ["Detection", "detect", "detect_by_configs"]


@dataclass(frozen=True, slots=True)
class Detection:
    """What was found out about a folder.

    Attributes:
        is_gptq: whether it holds a GPTQ checkpoint.
        source: what says so, or says that it is something else: a config file's name, "tensors",
            "file names", or "" where nothing does.
    """

    is_gptq: bool
    source: str = ""


def detect(folder: Path, *, open_pickles: bool = False) -> Detection:
    """Find out whether a folder holds a GPTQ checkpoint, be it one that cannot be loaded.

    Args:
        folder: the folder; one that is not there holds none.
        open_pickles: whether to list the tensors of .pt and .bin files, which takes a while;
            else their names are looked at.
    """
    if not folder.is_dir():
        return Detection(is_gptq=False)
    try:
        answer = detect_by_configs(_tables(folder))
    except ConfigInvalid as error:  # no other loader reads such a file
        return Detection(is_gptq=True, source=error.path.name)
    return answer or _by_tensors(folder, open_pickles=open_pickles)


def detect_by_configs(tables: Iterable[tuple[str, Mapping[str, Any]]]) -> Detection | None:
    """Find out by what configs say of quantisation; None where they say nothing.

    Args:
        tables: each with the file's name, read one by one until one of them tells.
    """
    for source, table in tables:
        if (method := method_of(table)) is not None:
            return Detection(method == "gptq", source)
        if "bits" in table or "wbits" in table:
            return Detection(is_gptq=True, source=source)
    return None


def _tables(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in CONFIG_FILES:
        if (file := folder / name).is_file():
            yield name, read_json(file)
    config = folder / "config.json"
    if config.is_file():
        try:
            quantization = read_json(config).get("quantization_config")
        except ConfigInvalid:  # which any model may have: the tensors tell
            return
        if isinstance(quantization, dict):
            yield config.name, quantization


def _by_tensors(folder: Path, *, open_pickles: bool) -> Detection:
    try:
        files = find_weight_files(folder).files
        pickled = any(file.suffix != ".safetensors" for file in files)
        if pickled and not open_pickles:
            return Detection(any(GPTQ_NAME.search(file.name) for file in files), "file names")
        headers = read_headers(files)
    except (GPTQLoaderError, OSError):
        return Detection(is_gptq=False)
    layers = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    packed = any(f"{layer}.qzeros" in headers and f"{layer}.scales" in headers for layer in layers)
    return Detection(packed, "tensors" if packed else "")
