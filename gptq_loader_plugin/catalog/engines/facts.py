"""What engines look at in a checkpoint: its config files as they stand, and its headers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.config import CONFIG_FILES, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.kernel import LayerSpec

__all__ = ["Facts", "gather_facts"]


@dataclass(frozen=True, slots=True)
class Facts:
    """A checkpoint as other programs see it.

    Attributes:
        configs: the quantization config of each file that has one, by the file's name.
        layers: its quantised layers.
        files: the names of its weight files.
        without_g_idx: how many layers have no g_idx.
        experts: how many layers are experts of a mixture.
        zeros: how zeros are really stored: "v1" is minus one.
    """

    configs: Mapping[str, Mapping[str, Any]]
    layers: tuple[LayerSpec, ...]
    files: tuple[str, ...]
    without_g_idx: int
    experts: int
    zeros: str


def gather_facts(checkpoint: Checkpoint) -> Facts:
    """Gather what engines look at, from files that are read already and from config files.

    Args:
        checkpoint: the open checkpoint, or its outline.
    """
    return Facts(
        configs=_configs(checkpoint.folder),
        layers=tuple(checkpoint.layers.values()),
        files=tuple(sorted({info.file.name for info in checkpoint.headers.values()})),
        without_g_idx=sum(f"{name}.g_idx" not in checkpoint.headers for name in checkpoint.layers),
        experts=sum(".experts." in name for name in checkpoint.layers),
        zeros=checkpoint.config.zeros,
    )


def _configs(folder: Path) -> dict[str, Mapping[str, Any]]:
    configs: dict[str, Mapping[str, Any]] = {
        name: read_json(folder / name) for name in CONFIG_FILES if (folder / name).is_file()
    }
    if (folder / "config.json").is_file():
        table = read_json(folder / "config.json").get("quantization_config")
        if isinstance(table, dict):
            configs["config.json"] = table
    return configs
