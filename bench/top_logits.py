"""Measure replies with the head as stored, found by its 8-bit copy, and made 8-bit.

    python bench/top_logits.py [REF] [--tokens 128] [--rounds 5]

Three models of one checkpoint are loaded in one process and answer in turn, greedily and with the
default sampling. Figures are the least processor time of this thread for a token: run it with
OMP_NUM_THREADS=1. A reply by the copy must be the reply of the head as stored; how many logits of
a token were taken by the head itself is counted over the prompt.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from machine import describe

import gptq_loader_plugin as gptq
from gptq_loader_plugin.kernel import TopLogitsHead

PROMPT = "Write a long story about a river and a bridge in the mountains."
SAMPLING = {
    "greedy": gptq.GenerateOptions(temperature=0),
    "default": gptq.GenerateOptions(seed=1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", nargs="?", default="demo")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(describe())
    heads = {"stored": "stored", "by its copy": None, "int8": "int8"}
    models = {
        name: gptq.load(options.reference, device="cpu", head=head) for name, head in heads.items()
    }
    print("| sampling | " + " | ".join(f"{name}, ms" for name in models) + " | same reply |")
    print("|---|" + "---|" * (len(models) + 1))
    for kind, how in SAMPLING.items():
        least, texts = dict.fromkeys(models, float("inf")), {}
        asked = gptq.GenerateOptions(
            max_new_tokens=options.tokens, temperature=how.temperature, seed=how.seed
        )
        for _ in range(options.rounds):
            for name, model in models.items():
                began = time.thread_time()
                reply = model.generate(PROMPT, asked)
                spent = (time.thread_time() - began) / reply.tokens
                least[name], texts[name] = min(least[name], spent), reply.text
        same = "yes" if texts["stored"] == texts["by its copy"] else "NO"
        print(
            f"| {kind} | " + " | ".join(f"{it * 1e3:.2f}" for it in least.values()) + f" | {same} |"
        )
    model = models["by its copy"]
    head = model.model.get_output_embeddings()
    if not isinstance(head, TopLogitsHead):
        return
    began = time.process_time()
    copy: Any = type(head).of(head)  # type: ignore[attr-defined]
    spent = time.process_time() - began
    print(
        f"the copy takes {copy.extra_bytes / 1e6:.0f} MB, made in {spent:.2f} s of processor time"
    )
    ids = torch.tensor([model.tokenizer(texts["stored"])["input_ids"]])
    with torch.inference_mode():
        states = model.model.get_decoder()(input_ids=ids).last_hidden_state[0]
        for needed in (1, 50):
            logits = head.top_logits(states, [needed] * len(states))
            assert logits is not None
            taken = (logits > -torch.inf).sum(dim=1).float()
            print(
                f"the {needed} likeliest of {logits.shape[1]:,}: "
                f"{float(taken.median()):.0f} by the head itself, {float(taken.max()):.0f} at most"
            )


if __name__ == "__main__":
    main()
