"""Read a quantization config, every field with the place it came from.

`quantize_config.json` (or `quant_config.json`) is asked first, then `quantization_config` in
`config.json`; in each, the top level first and then `meta`, where GPTQModel keeps what did not
exist in AutoGPTQ. What no file says, `infer.py` takes from the tensors.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from gptq_loader_plugin.errors import ConfigInvalid, UnsupportedFormat
from gptq_loader_plugin.kernel.packing import BITS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["CONFIG_FILES", "QuantConfig", "StoredConfig", "read_json", "read_stored_config"]

CONFIG_FILES = ("quantize_config.json", "quant_config.json")
FORMATS = ("gptq", "gptq_v2", "gptq_p")
Number = int | float


class QuantConfig(BaseModel):
    """How a checkpoint was quantised: what its config says, corrected by what its tensors say.

    Attributes:
        bits: the width of most layers' codes.
        group_size: input rows that share a scale, or -1 for one group.
        desc_act: whether rows are out of group order (act-order).
        sym: whether every zero is the same.
        damp_percent: the damping GPTQ used, where the config tells.
        checkpoint_format: "gptq" (zeros stored minus one), "gptq_v2" or "gptq_p", as it is read.
        zeros: "v1" where zeros are stored minus one, "v2" where they are stored as they are.
        dynamic: per-module overrides by regular expression, as GPTQModel writes them.
        sources: where each field came from: a file's name, "tensors", or "default".
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    bits: int
    group_size: int
    desc_act: bool
    sym: bool
    damp_percent: float | None = None
    checkpoint_format: Literal["gptq", "gptq_v2", "gptq_p"] = "gptq"
    zeros: Literal["v1", "v2"] = "v1"
    dynamic: dict[str, dict[str, Any]] = Field(default_factory=dict)
    sources: dict[str, str] = Field(default_factory=dict)


class StoredConfig(BaseModel):
    """A config file's fields as they stand, None where no file has them."""

    model_config = ConfigDict(frozen=True, extra="allow")

    bits: StrictInt | None = None
    group_size: StrictInt | None = None
    desc_act: StrictBool | None = None
    sym: StrictBool | None = None
    damp_percent: Number | None = None
    checkpoint_format: StrictStr | None = None
    quant_method: StrictStr | None = None
    pack_dtype: StrictStr | None = None
    model_file_base_name: StrictStr | None = None
    lm_head: StrictBool | None = None
    static_groups: StrictBool | None = None
    true_sequential: StrictBool | None = None
    is_marlin_format: StrictBool | None = None
    dynamic: dict[str, dict[str, Any]] | None = None
    sources: dict[str, str] = Field(default_factory=dict)

    def override(self, module: str) -> Mapping[str, object] | None:
        """Find the `dynamic` override for a module: {} for none, None where it stays unquantised.

        Keys are regular expressions, matched from the start of the name: `-:` leaves a module as
        it is, `+:` or nothing changes its settings; the first that matches counts.
        """
        for pattern, settings in (self.dynamic or {}).items():
            if re.match(_expression(pattern), module):
                return None if pattern.startswith("-:") else settings
        return {}


ALIASES = {"format": "checkpoint_format", "method": "quant_method", "wbits": "bits"}


def read_stored_config(folder: Path) -> tuple[StoredConfig, list[str]]:
    """Read what a folder's config files say about quantisation.

    Returns:
        The fields, and a warning for each that two files disagree on.

    Raises:
        ConfigInvalid: a file does not parse, or a field has the wrong type or an impossible value.
        UnsupportedFormat: a config names another method than GPTQ, or a format nobody here reads.
    """
    fields: dict[str, Any] = {}
    sources: dict[str, str] = {}
    warnings: list[str] = []
    for file, table in _tables(folder):
        for where, part in ((file.name, table), (f"{file.name}, meta", table.get("meta"))):
            if not isinstance(part, dict):
                continue
            for name, value in part.items():
                field = ALIASES.get(name, name)
                if value is None or field == "meta":
                    continue
                if field not in fields:
                    fields[field], sources[field] = value, where
                elif field in ("bits", "group_size", "desc_act") and fields[field] != value:
                    warnings.append(
                        f"{field} is {fields[field]} in {sources[field]} and {value} in {where}; "
                        f"{sources[field]} is followed"
                    )
    _check_method(fields.get("quant_method"), sources, folder)
    try:
        stored = StoredConfig(**{**fields, "sources": sources})
    except ValidationError as error:
        wrong = error.errors()[-1]
        field = str(wrong["loc"][0])
        raise ConfigInvalid(
            f"{field} is {json.dumps(fields.get(field), default=str)} in "
            f"{sources.get(field, 'the config')}; it must be {_expected(wrong['type'])}",
            path=folder,
            hint=f"correct {field}, or delete it: what the config does not say is taken from the "
            "tensors",
        ) from error
    _check(stored, folder)
    return stored, warnings


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that must hold a table.

    Raises:
        ConfigInvalid: it does not parse, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigInvalid(
            f"not JSON ({error})", path=file, hint="download the file again, or correct it"
        ) from error
    if not isinstance(content, dict):
        raise ConfigInvalid(
            f"holds {_kind(content)}, not a table",
            path=file,
            hint="download the file again, or correct it",
        )
    return content


def _expected(error: str) -> str:
    """Describe what a field must hold, by the type of pydantic's error."""
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    kinds |= {"string": "a text", "dict": "a table of tables"}
    return kinds.get(error.partition("_")[0], "something else")


def _kind(content: object) -> str:
    """Name what JSON can hold beside a table."""
    if content is None:
        return "null"
    return "a list" if isinstance(content, list) else "a single value"


def _expression(pattern: str) -> str:
    """Return a key of `dynamic` without the mark before it."""
    return pattern[2:] if pattern.startswith(("-:", "+:")) else pattern


def _tables(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    tables = [(file, read_json(file)) for name in CONFIG_FILES if (file := folder / name).is_file()]
    config = folder / "config.json"
    if config.is_file():
        quantization = read_json(config).get("quantization_config")
        if quantization is not None and not isinstance(quantization, dict):
            raise ConfigInvalid(
                "quantization_config is not a table",
                path=config,
                hint="correct it, or delete it: the tensors say what it would",
            )
        tables.append((config, quantization or {}))
    return tables


def _check_method(named: object, sources: Mapping[str, str], folder: Path) -> None:
    """Refuse another method before its fields are read as GPTQ's: EXL2 has 4.25 bits."""
    method = named.lower() if isinstance(named, str) else "gptq"
    if method not in ("gptq", "gptq_v2"):
        raise UnsupportedFormat(
            f"{sources['quant_method']} says the quantisation method is {method}, not gptq",
            path=folder,
            hint=f"use a program that loads {method}, or look for a GPTQ version of this model",
        )


def _check(stored: StoredConfig, folder: Path) -> None:
    kind = "marlin" if stored.is_marlin_format else (stored.checkpoint_format or "gptq").lower()
    if kind not in FORMATS:
        raise UnsupportedFormat(
            f"its tensors are stored in the format {kind}; {', '.join(FORMATS)} can be read",
            path=folder,
            hint="use the version of this model that was not repacked for one kernel",
        )
    if stored.pack_dtype not in (None, "int32"):
        raise UnsupportedFormat(
            f"its codes are packed into {stored.pack_dtype}; only int32 can be read",
            path=folder,
            hint="use a version of this model that is packed into int32",
        )
    if stored.bits is not None and stored.bits not in BITS:
        raise ConfigInvalid(
            f"bits is {stored.bits} in {stored.sources['bits']}; GPTQ has {BITS[0]} to {BITS[-1]}",
            path=folder,
            hint="correct bits, or delete it: the tensors say what it is",
        )
    if stored.group_size is not None and stored.group_size < 1 and stored.group_size != -1:
        raise ConfigInvalid(
            f"group_size is {stored.group_size} in {stored.sources['group_size']}; it must be "
            "positive, or -1 for none",
            path=folder,
            hint="correct group_size, or delete it: the tensors say what it is",
        )
    for pattern in stored.dynamic or {}:
        try:
            re.compile(_expression(pattern))
        except re.error as error:
            raise ConfigInvalid(
                f"dynamic holds {pattern!r}, which is no regular expression ({error})",
                path=folder,
                hint="correct it, or delete dynamic: the tensors say what is quantised",
            ) from error
