"""Run the real vLLM in a process of its own, and this package on the same prompt."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from environments import ROOT, python_of
from processes import run_process

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from collections.abc import Sequence
    from subprocess import CompletedProcess

PROBE = Path(__file__).parent / "probe.py"
SOURCES = [str(it) for it in (ROOT, ROOT / "kernels", ROOT / "extensions")]
IDS = [
    5,
    9,
    20,
    33,
    45,
    60,
    61,
    70,
    71,
    80,
    95,
    101,
    116,
    120,
    133,
    140,
    7,
    8,
    33,
    12,
    3,
    77,
    90,
    14,
]
# The same by vLLM's own kernels for a CPU, which compute in bfloat16: log-probabilities of the test
# models are off by .02 to .03, and by the same in every format.
ROUNDED = 0.05
CLOSE = 1e-4  # in log-probability: float32 summed in another order
FLOAT32 = {"dtype": "float32", "enforce_eager": True}
BY_NAME = {"quantization": "gptq_loader"}
FOLLOWING = 8  # tokens, as in probe.py
MINUTES = 10  # for one process, on a machine with other work


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt: log-probabilities, and the tokens that follow; or an error."""

    quantization: str = ""
    logprobs: tuple[float, ...] = ()
    following: tuple[int, ...] = ()
    operator_calls: int = 0
    error: str = ""
    log: str = ""

    def off_by(self, other: Answer) -> float:
        """Return the greatest difference of log-probabilities; fail where there are none."""
        assert not self.error, f"{self.error}\n{self.log[-3000:]}"
        assert not other.error, other.error
        return max(abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True))


def ask(
    models: Sequence[Path],
    *,
    environ: dict[str, str] | None = None,
    withhold: str = "",
    ids: Sequence[int] = IDS,
    vllm: Path | None = None,
    **options: Any,
) -> list[Answer]:
    """Load one model after another in one process of vLLM, and run the prompt on each.

    Args:
        models: their folders.
        environ: more of the process's environment.
        withhold: the suffix of tensors that vLLM's model does not load.
        ids: the prompt's tokens.
        vllm: a folder with another vLLM than the installed one.
        **options: of vLLM's `LLM`.
    """
    job = {
        "models": list(map(str, models)),
        "ids": list(ids),
        "options": options,
        "withhold": withhold,
    }
    workers = options.get("tensor_parallel_size", 1) > 1
    multiprocessing = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(workers))}
    environ = {**multiprocessing, **(environ or {})}
    completed = run_in_vllm(PROBE, json.dumps(job), environ=environ, vllm=vllm)
    log = completed.stdout + completed.stderr
    found = {}
    for line in completed.stdout.splitlines():
        if line.startswith("ANSWER "):
            content = json.loads(line.removeprefix("ANSWER "))
            model = content.pop("model")
            found[model] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    missing = {"error": f"vLLM ended with {completed.returncode}"}
    return [Answer(**(found.get(str(it)) or missing), log=log) for it in models]


def run_in_vllm(
    program: Path, *arguments: str, environ: dict[str, str], vllm: Path | None = None
) -> CompletedProcess[str]:
    """Run a program in vLLM's Python, with this tree's package.

    Args:
        program: the file.
        *arguments: its arguments.
        environ: more of the process's environment.
        vllm: a folder with another vLLM than the installed one.
    """
    with tempfile.TemporaryDirectory() as folder:
        return run_process(
            [str(python_of("vllm")), "-P", str(program), *arguments],
            cwd=folder,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "VLLM_CACHE_ROOT": folder,  # of what is compiled
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join([*([str(vllm)] if vllm else []), *SOURCES]),
                **({"VLLM_TARGET_DEVICE": "cpu"} if vllm else {}),
                **environ,
            },
            seconds=60 * MINUTES,
        )


def ours(folder: Path, ids: Sequence[int] = IDS) -> Answer:
    """Answer with this package, in float32, by the reference kernel."""
    with (
        gptq.load(folder, device="cpu", backend="reference", dtype="float32") as loaded,
        torch.inference_mode(),
    ):
        prompt = torch.tensor([list(ids)])
        logits = loaded.model(prompt).logits[0].float().log_softmax(-1)
        logprobs = logits[:-1].gather(1, prompt[0, 1:, None])[:, 0].tolist()
        following: list[int] = []
        for _ in range(FOLLOWING):
            more = torch.tensor([[*ids, *following]])
            following.append(int(loaded.model(more).logits[0, -1].argmax()))
    return Answer(logprobs=tuple(logprobs), following=tuple(following))
