"""What `quantize` writes, read by vLLM alone: it answers as here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from altered import DATA
from environments import needs_python_of
from test_vllm import HALF, OWN, WITHOUT
from vllm_process import ROUNDED, ask, ours

from gptq_loader_plugin.quantize import QuantizeOptions, quantize_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.host("vllm"),
    pytest.mark.timeout(1800),  # seconds: a start alone may take ten minutes
    needs_python_of("vllm"),
]

# Its kernel for a CPU has 4 bits alone; GPUs' have 8 too.
CHOICES: dict[str, dict[str, Any]] = {
    "by default": {"group_size": 32},
    "group-aware": {"group_size": 32, "order": "group-aware"},
    "without groups": {"group_size": -1},
    "groups by layer": {"size": "4.5bpw", "widths": (4,)},
}


def test_vllm_answers_as_here(tmp_path: Path) -> None:
    folders = []
    for name, choice in CHOICES.items():
        folders.append(tmp_path / name.replace(" ", "-"))
        options = QuantizeOptions(samples=4, seq_len=64, **choice)
        quantize_model(DATA / "base", folders[-1], options=options)
    answers = ask(folders, environ={**WITHOUT, **OWN}, **HALF)
    for folder, answer in zip(folders, answers, strict=True):
        assert answer.off_by(ours(folder)) <= ROUNDED, folder.name
        assert answer.quantization == "auto_gptq"
