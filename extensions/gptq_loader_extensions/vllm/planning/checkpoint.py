"""Open a checkpoint whose tensors vLLM's model loads one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint, open_checkpoint
from gptq_loader_plugin.errors import UnsupportedFormat

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.plugins import Plugins

__all__ = ["open_gptq"]


def open_gptq(path: Path, plugins: Plugins) -> GPTQCheckpoint:
    """Open a checkpoint that holds GPTQ's tensors.

    Raises:
        UnsupportedFormat: a plugin's reader opens it as another format.
        CheckpointError: the files are there and are wrong.
    """
    checkpoint = open_checkpoint(path, plugins.readers())
    if isinstance(checkpoint, GPTQCheckpoint):
        return checkpoint
    raise UnsupportedFormat(
        "this checkpoint is in a plugin's format, and vLLM loads GPTQ tensors only",
        path=path,
        hint="serve it without --engine vllm",
    )
