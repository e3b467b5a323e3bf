"""Call each entry point of the native library while one of its allocations fails, then the next.

    LD_PRELOAD=fails.so python short_of_memory.py

Prints what came of each as JSON: an entry point's answers while its first, second, ... allocation
failed, and whether it answered rightly when none did. `INTERPOSER` is the source of the library
that has allocations fail: those of the native library alone, which asks by `aligned_alloc`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["INTERPOSER"]

INTERPOSER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <stdatomic.h>
#include <string.h>

static atomic_long left;
static atomic_int failed;  /* told apart: two threads may take the last number down at once */

void fail_allocation(long which) { atomic_store(&left, which); }  /* 1 is the next one */
int failed_allocation(void) {
  atomic_store(&left, 0);
  return atomic_exchange(&failed, 0);
}

void* aligned_alloc(size_t alignment, size_t size) {
  Dl_info from;
  if (atomic_load(&left) > 0 && dladdr(__builtin_return_address(0), &from) &&
      strstr(from.dli_fname, "_gptq_cpu") && atomic_fetch_sub(&left, 1) == 1) {
    atomic_store(&failed, 1);
    return 0;
  }
  return memalign(alignment, size);
}
"""
TOKENS = 12  # of a prompt


def attempt(call: Callable[[], Any], which: int) -> tuple[Any, bool]:
    """Call on a thread of its own, which keeps no memory; its answer, and whether one failed."""
    allocations = ctypes.CDLL(None)
    answer: list[Any] = []

    def run() -> None:
        allocations.fail_allocation(which)
        try:
            answer.append(call())
        except MemoryError as error:
            answer.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return answer[0], bool(allocations.failed_allocation())


def main() -> None:
    import torch
    from test_native_step import build

    from gptq_loader_kernels.cpu import CpuKernel
    from gptq_loader_kernels.cpu.decoder import CACHE, NativeDecoder
    from gptq_loader_kernels.cpu.head import RowsLinear, TopLogitsLinear
    from gptq_loader_plugin.conformance.layers import Case, make_layer
    from gptq_loader_plugin.device import find_device
    from gptq_loader_plugin.generation.kv_cache import make_cache

    spec, packed, _ = make_layer(Case(rows=256, columns=200, act_order=True))
    device = find_device("cpu")
    layer = CpuKernel().prepare(spec, packed, device)
    x = torch.randn(70, 256, dtype=torch.bfloat16)
    model = build("llama", dtype=torch.bfloat16).model
    step = NativeDecoder(model)
    plain = torch.nn.Linear(128, 4096, bias=False, dtype=torch.bfloat16)
    rows, short = RowsLinear.of(plain), TopLogitsLinear.of(plain)
    states = torch.randn(2, 128, dtype=torch.bfloat16)

    def read(count: int) -> Any:
        caches = {CACHE: make_cache(model), "use_cache": True}
        return step.forward(inputs_embeds=states.new_ones(1, count, 128), **caches)[0]

    calls: dict[str, Callable[[], Any]] = {
        "pack": lambda: CpuKernel().prepare(spec, packed, device).words,
        "one row": lambda: layer(x[:1]),
        "rows": lambda: layer(x),
        "step": lambda: read(1),
        "prompt": lambda: read(TOKENS),
        "head": lambda: rows(states),
        "top logits": lambda: short.top_logits(states, [1, 3]),
        "bandwidth": lambda: CpuKernel().read_bandwidth(1 << 20, device),
    }
    outcome: dict[str, Any] = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, call in calls.items():
            with torch.inference_mode():
                right = call()
            answers = []
            while True:
                with torch.inference_mode():
                    answer, failed = attempt(torch.inference_mode()(call), len(answers) + 1)
                same = isinstance(answer, torch.Tensor) and torch.allclose(
                    answer.float(), right.float(), rtol=2e-2, atol=2e-2
                )
                if not failed:
                    break
                answers.append(answer if isinstance(answer, str | None) else same)
            whole = same if isinstance(right, torch.Tensor) else answer > 0
            outcome[f"{name}, {threads}"] = {"while": answers, "after": whole}
    json.dump(outcome, sys.stdout)


if __name__ == "__main__":
    main()
