"""A mix of calibration data, described in a YAML file as Open-Assistant's pretokenizer reads it.

    min_assistant_tokens: 20
    datasets:
      - my_chats:
          input_file_path: chats.jsonl.gz
          fraction: 0.5
          val_split: 0.1
      - prose:
          input_file_path: prose.txt
          size: 200

Such a file may have sections too: `defaults`, and others that are laid over them by their names
(`mix.yaml:my_section`). Data sets are local files, beside it unless a path says otherwise.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.system.paths import local_path, read_words

__all__ = ["CalibrationMix", "DataSet", "read_mix"]

# What that tool needs for the files it writes, and for what it fetches.
UNUSED = (
    "output_dir", "output_dir_suffix", "filename_prefix", "tokenizer_type", "vocab_file",
    "vocab_extra_ids_list", "cache_dir", "eval_size", "dataset_impl", "use_system_prefix",
)  # fmt: skip


class DataSet(BaseModel):
    """One data set of a mix.

    Attributes:
        name: what it is called.
        input_file_path: its file: JSON lines (.jsonl, .json, with .gz too), .parquet or text.
        fraction: the share of its training samples that is drawn.
        size: how many of them are drawn, in place of a share.
        val_split: the share of its rows that is held out.
        max_val_set: the most samples that are held out.
        lang: the languages to keep, separated by commas; None keeps all.
        top_k: of Open-Assistant's trees, keep replies of the first so many ranks; None keeps all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    input_file_path: Path
    fraction: Annotated[float, Field(gt=0, le=1)] = 1
    size: Annotated[int, Field(ge=1)] | None = None
    val_split: Annotated[float, Field(ge=0, lt=1)] = 0.2
    max_val_set: Annotated[int, Field(ge=0)] | None = None
    lang: str | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None


class CalibrationMix(BaseModel):
    """A mix of data sets.

    Attributes:
        datasets: the data sets, in their order.
        min_assistant_tokens: skip chats whose assistant's turns have fewer tokens, markup included.
        rng_seed: of the draws.
        unused: keys of the file that have no effect here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    datasets: Annotated[tuple[DataSet, ...], Field(min_length=1)]
    min_assistant_tokens: Annotated[int, Field(ge=0)] | None = None
    rng_seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    unused: tuple[str, ...] = ()

    @property
    def holds_out(self) -> bool:
        """Whether some samples are held out, which a result can be measured on."""
        return any(it.val_split > 0 and it.max_val_set != 0 for it in self.datasets)


def read_mix(typed: str | Path) -> CalibrationMix:
    """Read a mix.

    Args:
        typed: a YAML file, with the names of its sections behind a colon where it has several.

    Raises:
        OptionInvalid: there is no such file, or it is no mix: a key is unknown, a value impossible.
    """
    file, sections = _file_and_sections(str(typed))
    content = _section(file, _parsed(file), sections)
    extra = content.pop("datasets_extra", None) or []
    listed = content.pop("datasets", None) or []
    if not isinstance(listed, list) or not isinstance(extra, list) or not listed + extra:
        raise _wrong(file, "it lists no datasets", "write datasets: and a list of names below it")
    unused = tuple(key for key in content if key in UNUSED)
    fields = {key: value for key, value in content.items() if key not in UNUSED}
    known = ["datasets", "datasets_extra", "min_assistant_tokens", "rng_seed"]
    _check_keys(file, "", fields, known)
    sets = [_data_set(file, entry) for entry in listed + extra]
    try:
        return CalibrationMix(datasets=tuple(sets), unused=unused, **fields)
    except ValidationError as error:
        raise _impossible(file, "", error) from error


def _file_and_sections(typed: str) -> tuple[Path, list[str]]:
    path = local_path(typed)
    before, colon, names = typed.rpartition(":")
    if not path.is_file() and colon:
        path = local_path(before)
        if path.is_file():
            return path, [name.strip() for name in names.split(",")]
    if not path.is_file():
        raise OptionInvalid(
            f"there is no file {typed}", hint="name a .yaml file that lists data sets"
        )
    return path, []


def _parsed(file: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(read_words(file))
    except (yaml.YAMLError, RecursionError) as error:
        words = " ".join(str(error).split())[:200]
        raise _wrong(file, f"it is no YAML ({words})", "correct it there") from error
    if not isinstance(content, dict):
        raise _wrong(file, "it holds no keys", "write datasets: and a list of names below it")
    return {str(key): value for key, value in content.items()}


def _section(file: Path, content: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Lay the sections that are named over the defaults."""
    if "datasets" in content and not names:
        return content
    sections = {key: it for key, it in content.items() if isinstance(it, dict)}
    others = [key for key in sections if key != "defaults"]
    if not names and len(others) == 1 and "datasets" in sections[others[0]]:
        names = others
    if not names and others:
        shown = ", ".join(others[:10])
        hint = f"name one: {file}:{others[0]}"
        raise _wrong(file, f"it has several sections: {shown}", hint)
    merged: dict[str, Any] = dict(sections.get("defaults", {})) if names else dict(content)
    for name in names:
        if name not in sections:
            near = get_close_matches(name, others, 1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(others) or 'none'}"
            raise _wrong(file, f"it has no section {name!r}", hint)
        merged |= sections[name]
    return {str(key): value for key, value in merged.items()}


def _data_set(file: Path, entry: object) -> DataSet:
    fields: object = None
    name: object = entry
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, fields),) = entry.items()
    if not isinstance(name, str) or not isinstance(fields, dict | None):
        raise _wrong(
            file, f"{str(entry)[:80]!r} is no data set", "write - NAME: and its keys below"
        )
    fields = {str(key): value for key, value in (fields or {}).items()}
    _check_keys(file, f"{name}: ", fields, [it for it in DataSet.model_fields if it != "name"])
    path = fields.get("input_file_path")
    if not isinstance(path, str):
        raise _wrong(
            file, f"{name} names no file, and nothing is fetched", "give it an input_file_path"
        )
    found = file.parent / local_path(path)
    if not found.is_file():
        raise _wrong(file, f"{name}: there is no file {found}", "correct its input_file_path")
    try:
        return DataSet(**{**fields, "name": name, "input_file_path": found})
    except ValidationError as error:
        raise _impossible(file, f"{name}: ", error) from error


def _check_keys(file: Path, where: str, fields: dict[str, Any], known: list[str]) -> None:
    for key in fields:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(known)}"
            raise _wrong(file, f"{where}there is no key {key!r}", hint)


def _impossible(file: Path, where: str, error: ValidationError) -> OptionInvalid:
    first = error.errors()[0]
    key = ".".join(str(it) for it in first["loc"])
    return _wrong(file, f"{where}{key}: {first['msg'].lower()}", "correct it there")


def _wrong(file: Path, message: str, hint: str) -> OptionInvalid:
    return OptionInvalid(f"{file.name}: {message}", hint=hint)
