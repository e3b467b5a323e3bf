"""Run in vLLM's Python: share a checkpoint's blocks among workers, and compare with one.

    python ranks_probe.py FOLDER WORKERS...

The workers are forks of this process, which are ready at once; their layers and their sums over all
workers are vLLM's. For each number of workers a line `ANSWER {"workers": ..., "off_by": ...}`, by
which the worst of them is off.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from compile_probe import load
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context

ROWS = 7


def main(folder: Path, counts: list[int]) -> None:
    right = run(folder, 1)[0]
    for count in counts:
        off_by = max(float((y - right).abs().max()) for y in run(folder, count))
        sys.stdout.write(f"ANSWER {json.dumps({'workers': count, 'off_by': off_by})}\n")
        sys.stdout.flush()


def run(folder: Path, count: int) -> list[torch.Tensor]:
    """Fork the workers, and return what each computed."""
    os.environ["VLLM_DIST_IDENT"] = f"ranks-{os.getpid()}-{count}"  # of memory that they share
    workers = []
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(folder, rank, count)
                status = 0
            finally:
                sys.stderr.flush()
                os._exit(status)
        workers.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in workers)
    return [torch.load(f"y-{count}-{rank}") for rank in range(count)]


def work(folder: Path, rank: int, count: int) -> None:
    config = VllmConfig(additional_config={"gptq_loader": {"backend": "reference"}})
    with set_current_vllm_config(config), torch.inference_mode():
        store = f"file://{Path.cwd() / f'store-{count}'}"
        init_distributed_environment(count, rank, store, rank, "gloo")
        initialize_model_parallel(count)
        blocks = load(folder)
        hidden = json.loads((folder / "config.json").read_text())["hidden_size"]
        y = torch.randn(ROWS, hidden, generator=torch.Generator().manual_seed(1))
        with set_forward_context(None, config, num_tokens=ROWS):
            for block in blocks:
                y = block(y)
    torch.save(y, f"y-{count}-{rank}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(it) for it in sys.argv[2:]])
