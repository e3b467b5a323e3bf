"""See how transformers' continuous batching answers with packed layers, beside each reply alone.

    python bench/continuous_batching.py [REF]

It counts replies that are the same tokens as alone: greedy; sampled, where each has a seed; and
with a processor of the caller's own. docs/decisions/engine.md says what follows from it.
"""

from __future__ import annotations

import argparse
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import gptq_loader_plugin as gptq

PROMPTS = ["The", "Once upon a time there was a", "x", "She said"]
TOKENS = 16


class Even(LogitsProcessor):
    """Allow tokens of even numbers alone, as a grammar allows some."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Take the odd ones away."""
        del input_ids
        odd = torch.arange(scores.shape[-1]) % 2 == 1
        return cast("torch.FloatTensor", scores.masked_fill(odd, float("-inf")))


def main() -> None:
    """Print a line for each way to pick tokens."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("reference", nargs="?", default="demo")
    arguments = parser.parse_args()
    with gptq.load(arguments.reference, backend="reference", dtype="float32") as loaded:
        ids = [loaded.encode(it) for it in PROMPTS]
        for name, sampled, processor in (
            ("greedy", False, None),
            ("sampled", True, None),
            ("a processor", False, Even()),
        ):
            settings = {"do_sample": sampled, "max_new_tokens": TOKENS, "eos_token_id": -1}
            more = (
                {} if processor is None else {"logits_processor": LogitsProcessorList([processor])}
            )
            alone = []
            for prompt in ids:
                torch.manual_seed(0)
                y = loaded.model.generate(torch.tensor([prompt]), **settings, **more)  # type: ignore[operator]
                alone.append(y[0, len(prompt) :].tolist())
            beside = together(loaded.model, ids, GenerationConfig(**settings, pad_token_id=0), more)
            same = sum(one == other for one, other in zip(alone, beside, strict=True))
            print(f"{name}: {same} of {len(ids)} replies are what they are alone")


def together(
    model: Any,  # noqa: ANN401 - a transformers model
    ids: list[list[int]],
    config: GenerationConfig,
    more: dict[str, Any],
) -> list[Any]:
    """Write all replies by transformers' continuous batching."""
    how = ContinuousBatchingConfig(num_blocks=16, page_size=32, max_batch_tokens=64, seed=0)
    try:
        answers = model.generate_batch(
            ids, config, continuous_batching_config=how, progress_bar=False, **more
        )
    except (TypeError, ValueError) as error:
        print(f"  it takes none: {error}")
        return [None for _ in ids]
    return [it.generated_tokens for it in answers.values()]


if __name__ == "__main__":
    main()
