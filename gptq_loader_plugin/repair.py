"""Correct a checkpoint's small files: what is missing, and what says otherwise than its tensors.

Weights are never written. What changes is shown first; what was there is kept beside it.
"""

from __future__ import annotations

import difflib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import CONFIG_FILES, read_json
from gptq_loader_plugin.checkpoint.headers import read_headers
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.checkpoint.weight_files import WEIGHT_SUFFIXES
from gptq_loader_plugin.errors import (
    CheckpointError,
    ConfigInvalid,
    GPTQLoaderError,
    OptionInvalid,
)
from gptq_loader_plugin.kernel.packing import CONTINUOUS_BITS
from gptq_loader_plugin.system.atomic_file import write_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.checkpoint.config import QuantConfig

__all__ = ["Change", "Repair", "apply_changes", "plan_repair"]

INDEX = "model.safetensors.index.json"
FACTS = ("bits", "group_size", "desc_act", "sym", "checkpoint_format")
SPELLINGS = {"bits": ("wbits",), "checkpoint_format": ("format",)}
# In the order of a folder's listing; one of the first two is what a tokenizer is.
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
NEEDED = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, slots=True)
class Change:
    """A file that is to be written.

    Attributes:
        file: the file.
        before: its text, None where there is none.
        after: what it is to hold, None where it is copied.
        source: the file that is copied, None where `after` is written.
        why: what was wrong.
    """

    file: Path
    before: str | None
    after: str | None
    why: str
    source: Path | None = None

    def diff(self) -> str:
        """Return the change as a unified diff, of JSON laid out alike before and after."""
        if self.after is None:
            size = self.source.stat().st_size if self.source else 0
            return f"+++ {self.file}\n@@ a copy of {self.source}, {size:,} bytes @@\n"
        old = "/dev/null" if self.before is None else str(self.file)
        lines = difflib.unified_diff(
            _laid_out(self.before or "").splitlines(keepends=True),
            self.after.splitlines(keepends=True),
            old,
            str(self.file),
        )
        return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


@dataclass(frozen=True, slots=True)
class Repair:
    """What there is to correct.

    Attributes:
        folder: the checkpoint's.
        changes: the files to write.
        notes: what cannot be corrected from what is here, and what would help.
    """

    folder: Path
    changes: tuple[Change, ...]
    notes: tuple[str, ...]


def plan_repair(folder: Path, *, sibling: Path | None = None) -> Repair:
    """Find what is missing in a folder, and what its tensors contradict; write nothing.

    Args:
        folder: the checkpoint's.
        sibling: another folder of the same model, whose config and tokenizer may be copied.

    Raises:
        OptionInvalid: the sibling is of another model.
        CheckpointError: the weights themselves are wrong.
    """
    index = _index_change(folder)
    config = _config_by_tensors(folder)
    model, note = _model_config(folder, sibling)
    changes = [index, *_quantize_changes(folder, config), _config_change(folder, config, model)]
    copies, missing = _tokenizer(folder, sibling)
    notes = [it for it in (note, missing) if it]
    return Repair(folder, tuple(it for it in (*changes, *copies) if it is not None), tuple(notes))


def apply_changes(changes: Sequence[Change]) -> list[Path]:
    """Write changes, each after a copy of what was there; return the copies.

    Raises:
        GPTQLoaderError: a file cannot be written; those before it were.
    """
    kept: list[Path] = []
    for change in changes:
        try:
            if change.before is not None:
                kept.append(_keep(change.file))
            if change.after is not None:
                write_whole(change.file, change.after)
            elif change.source is not None:
                partial = change.file.with_name(f".{change.file.name}.partial")
                shutil.copyfile(change.source, partial)
                partial.replace(change.file)
        except OSError as error:
            raise GPTQLoaderError(
                f"{change.file} cannot be written: {error.strerror}",
                hint="free some disk space, or let that folder be written to; then run it again",
            ) from error
    return kept


def _keep(file: Path) -> Path:
    """Copy a file to a name beside it that is free."""
    number = 1
    while (backup := file.with_name(f"{file.name}.before-repair-{number}")).exists():
        number += 1
    return Path(shutil.copyfile(file, backup))


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _laid_out(text: str) -> str:
    """Lay out JSON as `_text` does, so that a difference is one of content."""
    try:
        table = json.loads(text)
    except ValueError:
        return text
    return _text(table)


def _table(file: Path) -> tuple[str | None, dict[str, Any] | None]:
    """Read a file's text, and the table in it; None where it is missing, or is none."""
    if not file.is_file():
        return None, None
    try:
        table = read_json(file)
    except ConfigInvalid:
        table = None
    return file.read_text(encoding="utf-8", errors="replace"), table


def _config_by_tensors(folder: Path) -> QuantConfig:
    """Read how the layers are quantised; configs that cannot be read are left out."""
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        kept = [
            it
            for it in folder.iterdir()
            if it.suffix in WEIGHT_SUFFIXES or (it.name == "config.json" and _shape(it))
        ]
        if not any(it.suffix in WEIGHT_SUFFIXES for it in kept):
            raise
        with tempfile.TemporaryDirectory() as alone:
            for file in kept:
                Path(alone, file.name).symlink_to(file.resolve())
            without = Path(alone, "config.json")
            if without.is_file() and "quantization_config" in (table := read_json(without)):
                table.pop("quantization_config")
                without.unlink()
                without.write_text(_text(table), encoding="utf-8")
            try:
                checkpoint = open_checkpoint(Path(alone))
            except CheckpointError:
                raise error from None
            config = checkpoint.config
            checkpoint.close()
            return config
    config = checkpoint.config
    checkpoint.close()
    return config


def _shape(file: Path) -> bool:
    return _table(file)[1] is not None


def _corrected(table: dict[str, Any], config: QuantConfig) -> tuple[dict[str, Any], list[str]]:
    """Return a quantisation's table as the tensors have it, and what was wrong."""
    corrected, wrong = dict(table), []
    for name in FACTS:
        value = getattr(config, name)
        if name == "checkpoint_format" and config.bits not in CONTINUOUS_BITS:
            value = "gptq_p"
        named = next((it for it in (name, *SPELLINGS.get(name, ())) if it in table), None)
        if named is None:
            corrected[name] = value
            wrong.append(f"{name} is missing")
        elif table[named] != value:
            corrected[named] = value
            wrong.append(f"{named} is {json.dumps(table[named])}, the tensors have {value}")
    if not any(it in table for it in ("quant_method", "method")):
        corrected["quant_method"] = "gptq"
        wrong.append("quant_method is missing")
    return corrected, wrong


def _quantize_changes(folder: Path, config: QuantConfig) -> list[Change]:
    """Correct quantize_config.json, or write it."""
    named = next((it for it in CONFIG_FILES if (folder / it).is_file()), CONFIG_FILES[0])
    file = folder / named
    before, table = _table(file)
    why = "" if before is None or table is not None else "it is no JSON"
    if table is None:
        _, model = _table(folder / "config.json")
        inner = (model or {}).get("quantization_config")
        table = dict(inner) if isinstance(inner, dict) else {}
        why = why or "it is missing"
    corrected, wrong = _corrected(table, config)
    if not why and not wrong:
        return []
    return [Change(file, before, _text(corrected), why or "; ".join(wrong))]


def _config_change(
    folder: Path, config: QuantConfig, model: dict[str, Any] | None
) -> Change | None:
    """Correct config.json's quantization_config, or write the file from a sibling's."""
    if model is None:
        return None
    file = folder / "config.json"
    before, table = _table(file)
    inner = (table or {}).get("quantization_config")
    if not isinstance(inner, dict):
        why = "quantization_config is missing" if table else "config.json is missing, or no JSON"
        inner = next((it for name in CONFIG_FILES if (it := _table(folder / name)[1])), {})
        corrected, _ = _corrected(inner, config)
    else:
        corrected, wrong = _corrected(inner, config)
        why = "; ".join(wrong)
    if not why:
        return None
    return Change(file, before, _text({**model, "quantization_config": corrected}), why)


def _model_config(folder: Path, sibling: Path | None) -> tuple[dict[str, Any] | None, str]:
    """Return what config.json says, or a sibling's; and what is missing where neither has any."""
    _, table = _table(folder / "config.json")
    theirs = _table(sibling / "config.json")[1] if sibling is not None else None
    if table is not None:
        if theirs and theirs.get("model_type") != table.get("model_type"):
            raise OptionInvalid(
                f"{sibling} is a model of type {theirs.get('model_type')}, and this of type "
                f"{table.get('model_type')}",
                hint="name the model that this one was made of",
            )
        return table, ""
    if theirs is None:
        return None, "config.json is missing: --from the model this was made of has it"
    return {name: it for name, it in theirs.items() if name != "quantization_config"}, ""


def _index_change(folder: Path) -> Change | None:
    """Write the index of several safetensors files, where it is missing or lies."""
    shards = sorted(it for it in folder.glob("*-of-*.safetensors") if not it.name.startswith("."))
    file = folder / INDEX
    if len(shards) < 2:
        return None
    headers = read_headers(shards)
    weight_map = {name: info.file.name for name, info in sorted(headers.items())}
    before, table = _table(file)
    if table is not None and table.get("weight_map") == weight_map:
        return None
    size = sum(info.nbytes for info in headers.values())
    after = _text({"metadata": {"total_size": size}, "weight_map": weight_map})
    why = "the index is missing" if before is None else "the index names other tensors or files"
    return Change(file, before, after, why)


def _tokenizer(folder: Path, sibling: Path | None) -> tuple[list[Change], str]:
    """Copy what a sibling has of the tokenizer and this folder does not; and say what lacks."""
    copies = [
        Change(folder / name, None, None, "it is missing", source=sibling / name)
        for name in TOKENIZER
        if sibling is not None and (sibling / name).is_file() and not (folder / name).exists()
    ]
    if any((folder / it).is_file() for it in NEEDED):
        # a tokenizer of its own: no second one beside it, only what belongs to it
        copies = [it for it in copies if it.file.name not in (*NEEDED, "merges.txt")]
        return copies, ""
    if any(it.file.name in NEEDED for it in copies):
        return copies, ""
    return copies, "the tokenizer is missing: --from the model this was made of has it"
