"""Check a checkpoint's files and labels: hashes, configs, and what the tensors say instead."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from gptq_loader_plugin.checkpoint.config import read_stored_config
from gptq_loader_plugin.verify.report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint

__all__ = ["check_hashes", "check_labels"]

SHA256 = re.compile(r"[0-9a-f]{64}")  # what the hub's cache calls a large file
STEP = 1 << 22
LABELS = ("bits", "group_size", "desc_act", "sym")


def check_hashes(checkpoint: Checkpoint) -> tuple[list[Finding], int]:
    """Hash the weight files whose hash is known: those of the hub's cache, named by it.

    Returns:
        What is wrong, and how many files were hashed.
    """
    findings, count = [], 0
    for file in sorted({info.file for info in checkpoint.headers.values()}):
        expected = file.resolve().name
        if not SHA256.fullmatch(expected):
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
    for name in LABELS:
        words = [it for it in checkpoint.warnings if it.startswith(f"{name} is ")]
        for message in words:
            yield Finding(
                "config",
                wrong=True,
                message=message,
                where=stored.sources.get(name, ""),
                fix=f"correct {name} to {getattr(config, name)}",
            )
    labelled = tuple(f"{name} is " for name in LABELS)
    for message in checkpoint.warnings:
        if not message.startswith(labelled):
            yield Finding("files", wrong=False, message=message)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(STEP):
            digest.update(part)
    return digest.hexdigest()
