"""How far a quantised model is from the one it was made of: KL divergence, and perplexity.

    python bench/divergence.py [MODEL CHECKPOINT ...] [--text FILE]

MODEL is a folder that transformers loads, or a .gguf file; without one, the demo and the model that
it is made of. The model answers 16 questions greedily, in float32; the divergence from it is the
mean over the tokens of its answers, of the softmax of all logits, in nats. The checkpoint is
computed by the reference kernel in float32, so that what is measured is the quantisation alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from machine import describe

import gptq_loader_plugin as gptq
from gptq_loader_plugin.generation.kl_divergence import kl_divergence
from gptq_loader_plugin.measure.perplexity import measure_perplexity, sample_text
from gptq_loader_plugin.quantize.demo import CHAT_TEMPLATE, prepare_demo
from gptq_loader_plugin.quantize.demo_model import find_demo_model
from gptq_loader_plugin.quantize.source import load_source

ANSWER_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Germany?",
    "Why is the sky blue?",
    "Write a short poem about a river.",
    "How do I boil an egg?",
    "What is 12 times 8?",
    "Who wrote Romeo and Juliet?",
    "Explain what a computer does to a child.",
    "Give me three tips for sleeping better.",
    "What is the largest planet of the solar system?",
    "Translate 'good morning' into Spanish.",
    "What should I pack for a day in the mountains?",
    "Write a Python function that adds two numbers.",
    "What is photosynthesis?",
    "Tell me a joke about a cat.",
    "How do vaccines work?",
)


@torch.inference_mode()
def main() -> None:
    """Print a table of checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--text", type=Path, help="for the perplexity; else a short sample")
    arguments = parser.parse_args()
    source, checkpoints = arguments.model, arguments.checkpoints
    if source is None:
        source = find_demo_model(progress=lambda _: None)
        checkpoints = [prepare_demo(progress=lambda _: None)]
    text = sample_text() if arguments.text is None else arguments.text.read_text("utf-8")
    model: Any
    model, tokenizer = load_source(source)
    if arguments.model is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    answers = [_answer(model, tokenizer, question) for question in QUESTIONS]
    print(describe())
    print("\n| checkpoint | KL divergence, nats a token | perplexity |\n|---|---|---|")
    for checkpoint in checkpoints:
        with gptq.load(checkpoint, backend="reference", dtype="float32") as loaded:
            divergence = torch.cat([_divergence(loaded.model, *answer) for answer in answers])
            perplexity = measure_perplexity(loaded, text, window_tokens=256).perplexity
        print(f"| {checkpoint.name} | {float(divergence.mean()):.4f} | {perplexity:.2f} |")


def _answer(
    model: Any,  # noqa: ANN401 - a transformers model
    tokenizer: Any,  # noqa: ANN401 - transformers' own
    question: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a prompt with the model's answer [1, tokens], and the log-probabilities in it."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
    )
    prompt = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
    ids = model.generate(prompt, do_sample=False, max_new_tokens=ANSWER_TOKENS)
    logits = model(input_ids=ids).logits[0, prompt.shape[1] - 1 : -1]
    return ids, logits.float().log_softmax(-1)


def _divergence(
    model: Any,  # noqa: ANN401 - a transformers model
    ids: torch.Tensor,
    expected: torch.Tensor,
) -> torch.Tensor:
    """Return the divergence of each token of an answer."""
    logits = model(input_ids=ids).logits[0, -1 - len(expected) : -1]
    return kl_divergence(expected, logits.float().log_softmax(-1))


if __name__ == "__main__":
    main()
