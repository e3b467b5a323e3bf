"""How fast replies come: each kernel of the CPU, by turns in one process.

    python bench/decode.py [REF] [--tokens 64] [--rounds 5]

Prints the median of the rounds: tokens a second of a greedy reply, and of reading a prompt of 512
tokens. Machines that others use too are noisy: compare the ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict

import torch

import gptq_loader_plugin as gptq

BACKENDS = ("cpu", "cpu-int4", "dense", "reference")
PROMPT_TOKENS = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", nargs="?", default="demo")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    models = {}
    for backend in BACKENDS:
        try:
            models[backend] = gptq.load(arguments.reference, device="cpu", backend=backend)
        except gptq.NoBackend as declined:
            print(f"{backend} declines: {declined.message.splitlines()[-1].strip()}")
    decode, prefill = defaultdict(list), defaultdict(list)
    for _ in range(arguments.rounds):
        for name, model in models.items():
            decode[name].append(decode_rate(model, arguments.tokens))
            prefill[name].append(prefill_rate(model))
    slowest = min(statistics.median(it) for it in decode.values())
    print("| kernel | tokens a second | ratio | prompt tokens a second |")
    print("|---|---|---|---|")
    for name in models:
        rate, reading = statistics.median(decode[name]), statistics.median(prefill[name])
        print(f"| {name} | {rate:.1f} | {rate / slowest:.2f} | {reading:.0f} |")
    print(f"{torch.get_num_threads()} threads")


def decode_rate(model: gptq.LoadedModel, tokens: int) -> float:
    """Measure tokens a second of a reply, its first token left out."""
    options = gptq.GenerateOptions(max_new_tokens=tokens, temperature=0)
    times = [time.perf_counter() for _ in model.stream("Once upon a time", options)]
    return (len(times) - 1) / (times[-1] - times[0])


def prefill_rate(model: gptq.LoadedModel) -> float:
    """Measure tokens a second of reading a prompt."""
    ids = torch.arange(100, 100 + PROMPT_TOKENS)[None]
    began = time.perf_counter()
    with torch.inference_mode():
        model.model(ids, logits_to_keep=1)
    return PROMPT_TOKENS / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
