"""Run in vLLM's Python: load each model that is named, and print what it answers, as JSON.

    python probe.py '{"models": [FOLDER...], "ids": [...], "options": {...}}'

One line a model: `quantization`, the log-probability of each token of `ids` but the first, the
tokens that follow, and how often compiled code has called our operator; or `error`, what vLLM said.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

FOLLOWING = 8  # tokens to generate


def main() -> None:
    job = json.loads(sys.argv[1])
    if job.get("withhold"):
        withhold(job["withhold"])
    called = count_operator_calls()
    for model in job["models"]:
        try:
            answer = {**ask(model, job["ids"], job["options"]), "operator_calls": len(called)}
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is the answer
            answer = {"error": f"{type(error).__name__}: {error}"}
        gc.collect()
        sys.stdout.write(f"ANSWER {json.dumps({'model': model, **answer})}\n")
        sys.stdout.flush()


def withhold(suffix: str) -> None:
    """Have vLLM's model drop tensors, as vLLM's own quantization methods have it drop g_idx."""
    from vllm.model_executor.models.utils import WeightsMapper

    from gptq_loader_extensions.vllm.layers.quantization import GPTQLoaderConfig

    dropping = staticmethod(lambda: WeightsMapper(orig_to_new_suffix={suffix: None}))
    GPTQLoaderConfig.get_checkpoint_weight_mapper = dropping


def count_operator_calls() -> list[None]:
    """Have the operator that compiled code calls leave a mark at each call."""
    from gptq_loader_extensions.vllm.layers import operator

    calls: list[None] = []
    real = operator.get_forward_context

    def counting() -> Any:
        calls.append(None)
        return real()

    operator.get_forward_context = counting
    return calls


def ask(model: str, ids: list[int], options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(model=model, max_model_len=256, seed=0, **options)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=FOLLOWING, prompt_logprobs=0, ignore_eos=True
    )
    prompt = {"prompt_token_ids": ids}
    output = llm.generate(prompt, sampling, use_tqdm=False)[0]
    config = llm.llm_engine.model_config
    probabilities = [
        entry[token].logprob
        for token, entry in zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    following = list(output.outputs[0].token_ids)
    llm.llm_engine.engine_core.shutdown()
    del llm, output
    cleanup_dist_env_and_memory()
    return {
        "quantization": config.quantization,
        "logprobs": probabilities,
        "following": following,
    }


if __name__ == "__main__":
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    main()
