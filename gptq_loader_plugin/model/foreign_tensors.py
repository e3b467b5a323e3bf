"""Tensors of a checkpoint that a model has no place for, in words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.model.tensor_names import Names

__all__ = ["foreign_warnings"]


def foreign_warnings(foreign: Sequence[str], names: Names) -> list[str]:
    """Say which parts of a checkpoint were not read."""
    if not foreign:
        return []
    roots = dict.fromkeys(_root(name, names) for name in foreign)
    named = ", ".join(list(roots)[:4])
    return [f"{len(foreign)} tensors of parts this model lacks were not read: {named}"]


def _root(name: str, names: Names) -> str:
    """Name the part that a tensor is of: `model.visual`, or a block past the model's last."""
    blocks = re.match(r"(.+?)\.\d+\.", name)
    if blocks is None:
        return name.rpartition(".")[0] or name
    return blocks[0][:-1] if names.is_module(blocks[1]) else blocks[1].rpartition(".")[0]
