"""Measure vLLM's CPU build: no compiling, no prefix cache.

GPTQ_BENCH_QUANTIZATION is vLLM's `quantization`, its own choice where there is none, and
GPTQ_BENCH_SEQUENCES how many sequences are read and written side by side, one where it is not set.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version

from turns import CONTEXT, DEPTH, Loaded, serve, token_ids

SEQUENCES = int(os.environ.get("GPTQ_BENCH_SEQUENCES", "1"))
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def load(folder: str) -> Loaded:
    from vllm import LLM, SamplingParams

    model = LLM(
        folder,
        dtype="bfloat16",
        quantization=os.environ.get("GPTQ_BENCH_QUANTIZATION"),
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=SEQUENCES,
        max_num_batched_tokens=CONTEXT * SEQUENCES,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )

    def run(prompt: int, tokens: int) -> float:
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        prompts = [{"prompt_token_ids": token_ids(prompt)}] * SEQUENCES
        model.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began

    return Loaded(
        lambda tokens: run(tokens, 1),
        lambda tokens: run(DEPTH, tokens + 1) - run(DEPTH, 1),
        {
            "version": version("vllm-cpu"),
            "threads": len(os.sched_getaffinity(0)),
            "quantization": model.llm_engine.model_config.quantization,
        },
    )


if __name__ == "__main__":
    import vllm  # noqa: F401 - so that its import is no part of the load

    serve(load)
