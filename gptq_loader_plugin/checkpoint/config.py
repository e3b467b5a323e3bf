"""Read a quantization config, every field with the place it came from.

`quantize_config.json` (or `quant_config.json`) is asked first, then `quantization_config` in
`config.json`; in each, the top level first and then `meta`, where GPTQModel keeps what did not
exist in AutoGPTQ. What no file says, `infer.py` takes from the tensors.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from gptq_loader_plugin.checkpoint.overrides import Overrides, pattern_fault
from gptq_loader_plugin.errors import ConfigInvalid, UnsupportedFormat
from gptq_loader_plugin.kernel.packing import BITS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "CONFIG_FILES",
    "QuantConfig",
    "StoredConfig",
    "method_of",
    "read_json",
    "read_stored_config",
]

CONFIG_FILES = ("quantize_config.json", "quant_config.json")
JSON_BYTES = 1 << 24
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

        Raises:
            UnsupportedFormat: the patterns take too long to match.
        """
        if not self.dynamic:
            return {}
        try:
            pattern = self._overrides.find(module)
        except TimeoutError as error:
            raise UnsupportedFormat(
                f"dynamic cannot be followed: {error}",
                path=Path(self.sources.get("dynamic", "config.json")),
                hint="correct it, or delete dynamic: the tensors say what is quantised",
            ) from error
        if pattern is None:
            return {}
        return None if pattern.startswith("-:") else self.dynamic[pattern]

    @cached_property
    def _overrides(self) -> Overrides:
        return Overrides(self.dynamic or {})


ALIASES = {"format": "checkpoint_format", "method": "quant_method", "wbits": "bits"}
# What writers call GPTQ: AutoGPTQ and GPTQModel have had these.
METHODS = ("gptq", "gptq_v2", "gptqmodel", "gptq_model", "autogptq", "auto_gptq", "auto-gptq")
# AutoRound has names of its own for the method, and says beside it how the codes are packed:
# auto_round:auto_gptq, auto_round:gptq:exllamav2 and such are GPTQ's tensors.
AUTOROUND = ("auto-round", "auto_round", "autoround", "intel/auto-round", "inc")
AUTOROUND_OTHERS = ("awq", "fp8", "fp4", "mx", "nv", "gguf", "llm_compressor")
UNQUANTISED_BITS = 16  # and more, in AutoRound's extra_config: the module stays as it is


def method_of(table: Mapping[str, Any]) -> str | None:
    """Return the quantisation method a config names: "gptq", whatever its writer calls that.

    Args:
        table: a config file's content.

    Returns:
        "gptq", the name of another method in lower case, or None where none is named.
    """
    named = table.get("quant_method") or table.get("method")
    if not isinstance(named, str):
        return None
    method = named.lower()
    if method in AUTOROUND:
        packing = str(table.get("packing_format") or table.get("backend") or "").lower()
        other = next((it for it in AUTOROUND_OTHERS if it in packing), None)
        return "gptq" if other is None else f"{method} ({packing})"
    return "gptq" if method in METHODS else method


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
                value = _normalised(field, value)  # noqa: PLW2901 - as one would write it today
                if value is None or field == "meta":
                    continue
                if field not in fields:
                    fields[field], sources[field] = value, where
                elif field in ("bits", "group_size", "desc_act") and fields[field] != value:
                    warnings.append(
                        f"{field} is {fields[field]} in {sources[field]} and {value} in {where}; "
                        f"{sources[field]} is followed"
                    )
    _check_method(fields, sources, folder)
    if not fields.get("dynamic") and (extra := fields.get("extra_config")):
        fields["dynamic"], sources["dynamic"] = _overrides(extra), sources["extra_config"]
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
        ConfigInvalid: it does not parse, holds something else, or is too large for a config.
    """
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(file)
    if (size := file.stat().st_size) > JSON_BYTES:
        raise ConfigInvalid(
            f"is {size:,} bytes, and no config has more than {JSON_BYTES:,}",
            path=file,
            hint="download the file again, or correct it",
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not text, not JSON, numbers without end
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


def _normalised(field: str, value: object) -> object:
    """Return a value as it is usually written: "4" and 4.0 are 4, "torch.int32" is "int32"."""
    match field:
        case "bits":
            value = _integer(value)
        case "group_size":
            value = _integer(value) or None  # 0 says nothing
        case "desc_act" | "sym":
            spelled = {"true": True, "false": False, "1": True, "0": False}
            value = spelled.get(str(value).strip().lower(), value)
        case "pack_dtype":
            value = value.removeprefix("torch.") if isinstance(value, str) else value
        case "dynamic":
            value = value or None
        case _:
            pass
    return value


def _integer(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _overrides(extra: object) -> dict[str, dict[str, Any]]:
    """Write AutoRound's `extra_config`, settings by a module's name, as `dynamic` has them."""
    overrides: dict[str, dict[str, Any]] = {}
    for name, settings in extra.items() if isinstance(extra, dict) else ():
        if not isinstance(settings, dict):
            continue
        left = int(settings.get("bits") or 0) >= UNQUANTISED_BITS
        pattern = name if any(it in name for it in "*+[(\\") else f"{re.escape(name)}$"
        overrides[f"{'-:' if left else '+:'}{pattern}"] = {
            key: _normalised(key, settings[key])
            for key in ("bits", "group_size", "sym")
            if settings.get(key) is not None
        }
    return overrides


def _check_method(fields: Mapping[str, Any], sources: Mapping[str, str], folder: Path) -> None:
    """Refuse another method before its fields are read as GPTQ's: EXL2 has 4.25 bits."""
    method = method_of(fields) or "gptq"
    if method != "gptq":
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
    if fault := pattern_fault(stored.dynamic or {}):
        raise ConfigInvalid(
            f"dynamic holds {fault}",
            path=folder,
            hint="correct it, or delete dynamic: the tensors say what is quantised",
        )
