"""Another vLLM's Python files, with the installed one's compiled modules, answer as here.

The contract says that the names are there; this, that they still mean the same: a checkpoint is
claimed, loaded, multiplied and answered by the other version's own code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from altered import DATA
from environments import needs_python_of
from vllm_checkpoints import ACT_ORDER, V2, make
from vllm_process import CLOSE, FLOAT32, ask, ours
from vllm_versions import SOURCE, link_with_compiled_parts

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.host("vllm"),
    pytest.mark.timeout(1800),  # seconds: a start alone may take ten minutes
    needs_python_of("vllm"),
    pytest.mark.skipif(SOURCE is None, reason="VLLM_SOURCE names no other vLLM"),
]

MIXTURES = ("a Qwen3-MoE with a quantised router", "a mixture with a quantised router")


def test_another_vllm_answers_as_here(tmp_path: Path) -> None:
    vllm = link_with_compiled_parts(tmp_path / "vllm")
    mixtures = [make(name, tmp_path / str(number)) for number, name in enumerate(MIXTURES)]
    folders = [DATA / ACT_ORDER, DATA / V2, *mixtures]
    for folder, answer in zip(folders, ask(folders, vllm=vllm, **FLOAT32), strict=True):
        right = ours(folder)
        assert answer.off_by(right) <= CLOSE, folder
        assert answer.following == right.following
        assert answer.quantization == "gptq_loader"
