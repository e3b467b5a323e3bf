"""Check a checkpoint's files and labels: hashes, configs, and what the tensors say instead."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING

from gptq_loader_plugin.checkpoint.config import read_stored_config
from gptq_loader_plugin.verify.report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.config import StoredConfig
    from gptq_loader_plugin.checkpoint.protocol import Checkpoint

__all__ = ["check_hashes", "check_index", "check_labels"]

SHA256 = re.compile(r"[0-9a-f]{64}")  # what the hub's cache calls a large file
STEP = 1 << 22
LABELS = ("bits", "group_size", "desc_act", "sym")
# Where programs note the hashes of what they download: huggingface_hub beside each file of a
# folder, as the second line; text-generation-webui's download-model.py in one list.
NOTES = (".cache", "huggingface", "download")
WEBUI_NOTE = "huggingface-metadata.txt"
WEBUI_LINE = re.compile(r"^\s*([0-9a-f]{64})\s+(\S.*?)\s*$", re.MULTILINE)


def check_hashes(checkpoint: Checkpoint) -> tuple[list[Finding], int]:
    """Hash the weight files whose hash is known.

    Those of the hub's cache are named by it; beside those of a folder, the program that downloaded
    them may have left a note.

    Returns:
        What is wrong, and how many files were hashed.
    """
    findings, count = [], 0
    for file in sorted({info.file for info in checkpoint.headers.values()}):
        expected = _known_hash(file)
        if expected is None:
            continue
        count += 1
        if _sha256(file) != expected:
            findings.append(
                Finding(
                    "files",
                    wrong=True,
                    message=f"{file.name} is not what the hub has: its hash differs",
                    where=file.name,
                    fix="delete it, and download the checkpoint again",
                )
            )
    return findings, count


def check_labels(checkpoint: Checkpoint) -> list[Finding]:
    """Compare what the config says with what the tensors are."""
    return list(_labels(checkpoint))


def _labels(checkpoint: Checkpoint) -> Iterator[Finding]:
    stored, _ = read_stored_config(checkpoint.folder)
    config = checkpoint.config
    label = stored.checkpoint_format
    # symmetric zeros tell the formats apart too: v1 stores one less
    if label is not None and config.sources.get("checkpoint_format") == "tensors":
        yield Finding(
            "zeros",
            wrong=True,
            message=f"the config says {label}, and zeros are stored as {config.zeros} has them: "
            "programs that believe it are off by one step",
            where=stored.sources.get("checkpoint_format", ""),
            fix=f"correct checkpoint_format to {config.checkpoint_format}",
        )
    elif label is None and config.zeros == "v2" and checkpoint.layers:
        yield Finding(
            "zeros",
            wrong=False,
            message="no config says how zeros are stored, and they are stored as v2: other "
            "programs take v1, and are off by one step",
            fix="add checkpoint_format: gptq_v2 to quantize_config.json and config.json",
        )
    for name in LABELS:
        words = [it for it in checkpoint.warnings if it.startswith(f"{name} is ")]
        if name == "desc_act" and stored.desc_act and not _ordered(checkpoint):
            continue  # its g_idx is missing, which is said instead
        for message in words:
            yield Finding(
                "config",
                wrong=True,
                message=message,
                where=stored.sources.get(name, ""),
                fix=f"correct {name} to {getattr(config, name)}",
            )
    yield from _groups(checkpoint, stored)
    labelled = tuple(f"{name} is " for name in LABELS)
    for message in checkpoint.warnings:
        if not message.startswith(labelled):
            yield Finding("files", wrong=False, message=message)


def check_index(checkpoint: Checkpoint) -> list[Finding]:
    """Compare what shard indexes name with what the files hold."""
    findings = []
    for index in sorted(checkpoint.folder.glob("*.safetensors.index.json")):
        try:
            table = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
            named = {str(name): str(file) for name, file in table.items()}
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            continue  # opening it says so
        words, wrong = _stale(named, checkpoint)
        if words:
            findings.append(
                Finding(
                    "files",
                    wrong=wrong,
                    message=f"{index.name} is not of these files: {words}; programs that follow it "
                    "fail, or load only a part",
                    where=index.name,
                    fix="download it again; where there is one weight file, delete it",
                )
            )
    return findings


def _stale(named: dict[str, str], checkpoint: Checkpoint) -> tuple[str, bool]:
    """Say what an index has that the files have not, and whether the model lacks it."""
    headers = checkpoint.headers
    present = {info.file.name for info in headers.values()}
    absent = sorted({file for file in named.values() if file not in present})
    if absent and len(absent) == len(set(named.values())):
        return f"it names {absent[0]}", False
    lacking = [name for name in named if name not in headers]
    if lacking:
        return f"it names {lacking[0]}, and {len(lacking)} such tensors are in no file", True
    moved = [name for name, file in named.items() if headers[name].file.name != file]
    if moved:
        return f"{moved[0]} is in {headers[moved[0]].file.name}, not in {named[moved[0]]}", False
    return "", False


def _ordered(checkpoint: Checkpoint) -> bool:
    """Whether the layers with groups that should have a g_idx do."""
    return not _without_order(checkpoint)


def _without_order(checkpoint: Checkpoint) -> list[str]:
    return [
        name
        for name, layer in checkpoint.layers.items()
        if layer.groups > 1 and f"{name}.g_idx" not in checkpoint.headers
    ]


def _groups(checkpoint: Checkpoint, stored: StoredConfig) -> Iterator[Finding]:
    """Find layers without the g_idx that act-order needs."""
    without = _without_order(checkpoint)
    grouped = sum(layer.groups > 1 for layer in checkpoint.layers.values())
    ordered = any(layer.desc_act and layer.groups > 1 for layer in checkpoint.layers.values())
    if not without or not (ordered or (stored.desc_act and not stored.static_groups)):
        return
    yield Finding(
        "layers",
        wrong=True,
        message=f"g_idx is missing from {len(without)} of {grouped} layers ({without[0]}), and "
        "the model was quantised with act-order: which scale belongs to which row is lost",
        where=without[0],
        fix="download the checkpoint again; if it stays so, it was published damaged",
    )


def _known_hash(file: Path) -> str | None:
    if SHA256.fullmatch(name := file.resolve().name):
        return name
    note = file.parent.joinpath(*NOTES, f"{file.name}.metadata")
    if note.is_file():
        lines = note.read_text(encoding="utf-8", errors="replace").split()
        return next((line for line in lines if SHA256.fullmatch(line)), None)
    note = file.parent / WEBUI_NOTE
    if note.is_file():
        text = note.read_text(encoding="utf-8", errors="replace")
        return {name: digest for digest, name in WEBUI_LINE.findall(text)}.get(file.name)
    return None


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(STEP):
            digest.update(part)
    return digest.hexdigest()
