"""What `convert` writes, read by vLLM alone: every format answers as the checkpoint does here."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import pytest
from altered import DATA
from environments import needs_python_of
from test_vllm import HALF, OWN, WITHOUT
from vllm_process import ROUNDED, Answer, ask, ours

from gptq_loader_plugin.convert.options import ConvertOptions
from gptq_loader_plugin.convert.run import convert_checkpoint
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.convert.options import Format

pytestmark = [
    pytest.mark.host("vllm"),
    pytest.mark.timeout(1800),  # seconds: a start alone may take ten minutes
    needs_python_of("vllm"),
]

SOURCES: dict[str, tuple[Format, ...]] = {
    "gptq-2bit-64g-noact-sym": ("awq", "compressed-tensors"),
    "gptq-3bit-32g-noact-asym": ("awq", "compressed-tensors"),
    "gptq-3bit-noneg-act-sym": ("awq", "compressed-tensors"),
    # the one that vLLM takes as GPTQ, too: 4 bits, symmetric, and no groups that act-order mixes
    "gptq-4bit-noneg-act-sym": ("awq", "compressed-tensors", "gptq", "gptq_v2"),
    "gptq_v2-4bit-64g-noact-asym": ("awq", "compressed-tensors"),
}
METHODS = {"awq": "awq", "compressed-tensors": "compressed-tensors", "gptq": "auto_gptq",
           "gptq_v2": "auto_gptq"}  # fmt: skip
ALL = [(name, to) for name, formats in SOURCES.items() for to in formats]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, Format], Answer]:
    """Convert each, and ask vLLM in one process without this package's plug-in."""
    folder = tmp_path_factory.mktemp("converted")
    made = [folder / f"{name}-{to}" for name, to in ALL]
    for (name, to), out in zip(ALL, made, strict=True):
        convert_checkpoint(DATA / name, out, options=ConvertOptions(to), plugins=Plugins())
    return dict(zip(ALL, ask(made, environ={**WITHOUT, **OWN}, **HALF), strict=True))


@cache
def right(folder: Path) -> Answer:
    return ours(folder)


@pytest.mark.parametrize(("name", "to"), ALL)
def test_vllm_reads_what_was_converted(
    name: str, to: Format, answers: dict[tuple[str, Format], Answer]
) -> None:
    answer = answers[name, to]
    assert answer.off_by(right(DATA / name)) <= ROUNDED
    assert answer.quantization == METHODS[to]
    assert answer.logprobs == answers[name, "awq"].logprobs, "to the bit, whatever the format"
