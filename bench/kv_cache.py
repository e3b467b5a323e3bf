"""How far a model with its context in 8 bits is from itself: perplexity and KL divergence.

    python bench/kv_cache.py REF --text FILE [--windows 10] [--window-tokens 1024]

Each window of the text is read through a cache of each kind, in parts of 8 tokens after its first
half, so that its second half is predicted as a reply is. The divergence is from the model's own
dtype, in nats a token; what rounding alone does is seen where the parts begin after a quarter.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from machine import describe

import gptq_loader_plugin as gptq
from gptq_loader_plugin.generation.kl_divergence import kl_divergence
from gptq_loader_plugin.generation.kv_cache import make_cache, make_int8_cache
from gptq_loader_plugin.transformers_compat import find_cache_argument

if TYPE_CHECKING:
    from collections.abc import Callable

PART = 8  # tokens that a step takes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reference")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument("--window-tokens", type=int, default=1024)
    arguments = parser.parse_args()
    print(describe())
    with gptq.load(arguments.reference, device="cpu", check=False) as loaded:
        model: Any = loaded.model
        text = arguments.text.read_text(encoding="utf-8")
        ids = loaded.tokenizer(text, verbose=False)["input_ids"]
        windows = torch.tensor(ids).split(arguments.window_tokens)[: arguments.windows]
        kinds: dict[str, tuple[Callable[[Any], Any], int]] = {
            "the model's dtype": (make_cache, 2),
            "the same, other parts": (make_cache, 4),
            "8 bits": (make_int8_cache, 2),
        }
        found: dict[str, list[tuple[torch.Tensor, ...]]] = {name: [] for name in kinds}
        held = {}
        for window in windows:
            reference = None
            for name, (make, share) in kinds.items():
                log_p, held[name] = read(model, make, window, len(window) // share)
                reference = log_p if reference is None else reference
                loss = torch.nn.functional.nll_loss(log_p[:-1], window[1:], reduction="none")
                same = (reference.argmax(-1) == log_p.argmax(-1)).float()
                found[name].append((loss, kl_divergence(reference, log_p), same))
    print("\n| keys and values | bytes a position | perplexity | KL | same token |")
    print("|---|---|---|---|---|")
    for name, each in found.items():
        loss, kl, same = (float(torch.cat(it).mean()) for it in zip(*each, strict=True))
        print(f"| {name} | {held[name]:,.0f} | {math.exp(loss):.4f} | {kl:.6f} | {same:.2%} |")


@torch.inference_mode()
def read(
    model: Any,  # noqa: ANN401 - transformers'
    make: Callable[[Any], Any],
    window: torch.Tensor,
    first: int,
) -> tuple[torch.Tensor, float]:
    """Give log-probabilities [tokens, vocabulary], and the bytes that a position's room takes."""
    cache = make(model)
    parts = window[None].split((first, *(PART,) * ((len(window) - first) // PART)), dim=1)
    arguments = {find_cache_argument(model): cache, "use_cache": True}
    logits = torch.cat([model(input_ids=it, **arguments).logits[0] for it in parts])
    rooms = [(it.room, getattr(it, "scales", None)) for it in cache.layers]
    held = sum(it.nbytes for pair in rooms for it in pair if it is not None)
    return logits.float().log_softmax(-1), held / rooms[0][0].shape[3]


if __name__ == "__main__":
    main()
