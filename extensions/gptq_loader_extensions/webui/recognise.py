"""Tell a GPTQ checkpoint from any other folder, quickly: from its config, else from headers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.checkpoint.headers import read_headers
from gptq_loader_plugin.checkpoint.weight_files import find_weight_files
from gptq_loader_plugin.errors import ConfigInvalid, GPTQLoaderError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["is_gptq"]

OWN_CONFIGS = ("quantize_config.json", "quant_config.json")
# Names that GPTQ-for-LLaMa's and AutoGPTQ's files had: llama-7b-4bit-128g.pt, gptq_model-4bit.bin
GPTQ_NAME = re.compile(r"gptq|(?<!\d)[2-8]-?bit", re.IGNORECASE)


def is_gptq(folder: Path) -> bool:
    """Say whether `folder` holds a GPTQ checkpoint, be it one that cannot be loaded."""
    if not folder.is_dir():
        return False
    try:
        tables = _tables(folder)
    except ConfigInvalid:
        return True  # no other loader reads such a file: let the load say what is wrong with it
    method = next((it for table in tables if (it := _method(table))), None)
    if method is not None:
        return method in ("gptq", "gptq_v2")
    if any("bits" in table or "wbits" in table for table in tables):
        return True
    return _looks_packed(folder)


def _tables(folder: Path) -> list[dict[str, Any]]:
    tables = [read_json(file) for name in OWN_CONFIGS if (file := folder / name).is_file()]
    config = folder / "config.json"
    if config.is_file():
        quantization = read_json(config).get("quantization_config")
        if isinstance(quantization, dict):
            tables.append(quantization)
    return tables


def _method(table: dict[str, Any]) -> str | None:
    value = table.get("quant_method") or table.get("method")
    return value.lower() if isinstance(value, str) else None


def _looks_packed(folder: Path) -> bool:
    """Look for packed layers in safetensors' headers; of pickles only the names are looked at."""
    try:
        found = find_weight_files(folder)
        if any(file.suffix != ".safetensors" for file in found):
            return any(GPTQ_NAME.search(file.name) for file in found)
        headers = read_headers(found)
    except GPTQLoaderError:
        return False
    packed = [name.removesuffix(".qweight") for name in headers if name.endswith(".qweight")]
    return bool(packed) and all(
        f"{name}.{part}" in headers for name in packed for part in ("qzeros", "scales")
    )
