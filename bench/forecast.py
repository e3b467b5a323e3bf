"""How far a forecast is off: memory part by part, and the speed of a reply, as they are measured.

    python bench/forecast.py [REF...] [--rounds 5] [--no-speed] [--json]

Forecasts each REF (the demo unless named) from its headers, loads it, and counts the bytes of its
tensors by the forecast's parts; keys and values are those of a prompt. The speed of a reply is
measured by turns with memory's, so that other work slows both alike.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

import torch

import gptq_loader_plugin as gptq
from gptq_loader_plugin.catalog.forecast import HIGHEST, LOWEST, SHARE, forecast
from gptq_loader_plugin.catalog.headers_alone import with_headers
from gptq_loader_plugin.kernel import TopLogitsHead
from gptq_loader_plugin.measure.speed import measure_speed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gptq_loader_plugin.catalog.forecast import Forecast
    from gptq_loader_plugin.generation.loaded import LoadedModel

CONTEXT = 256
KEYS = "keys and values"


def forecast_of(reference: str, device: str) -> Forecast:
    """Forecast a checkpoint from its headers alone."""
    from gptq_loader_plugin.device import find_device

    plugins = gptq.Plugins(installed=True)
    return with_headers(
        reference,
        lambda checkpoint: forecast(
            checkpoint, find_device(device), plugins.kernels(), context=CONTEXT, bandwidth=1.0
        ),
        plugins=plugins,
    )


def held_parts(model: LoadedModel) -> dict[str, int]:
    """Count the bytes that a loaded model holds, by the forecast's parts."""
    module = model.model
    counted: set[int] = set()

    def count(tensors: Iterable[torch.Tensor]) -> int:
        size = 0
        for tensor in tensors:
            if tensor.data_ptr() not in counted:
                counted.add(tensor.data_ptr())
                size += tensor.numel() * tensor.element_size()
        return size

    embedding: Any = module.get_input_embeddings()
    head: Any = module.get_output_embeddings()
    parts = {"embedding": count([embedding.weight])}
    layers = [
        module.get_submodule(choice.layer.name)
        for choice in model.plan.choices
        if choice.layer.name in dict(module.named_modules())
    ]
    parts["quantised layers"] = sum(count([*it.parameters(), *it.buffers()]) for it in layers)
    parts["head, norms and what is not quantised"] = count(
        [*module.parameters(), *module.buffers()]
    )
    if isinstance(head, TopLogitsHead):
        parts["the head's copy in 8 bits"] = head.extra_bytes
    ids = torch.arange(CONTEXT, device=module.device)[None] % model.vocab_size
    with torch.inference_mode():
        cache = module(input_ids=ids, use_cache=True).past_key_values
    parts[KEYS] = count(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    return parts


def errors(made: Forecast, held: dict[str, int]) -> dict[str, float]:
    """Return how far each part is off, as a share of what is held in all, and all together."""
    total = sum(held.values())
    off = {name: (made.parts.get(name, 0) - size) / size for name, size in held.items() if size}
    scratch = made.parts.get("scratch", 0)  # is there while a product runs, and not counted here
    return {**off, "together": (made.memory_bytes - scratch - total) / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("references", nargs="*", default=["demo"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-speed", action="store_true", help="memory alone")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for reference in arguments.references:
        made = forecast_of(reference, arguments.device)
        with gptq.load(reference, device=arguments.device) as model:
            held = held_parts(model)
            row: dict[str, Any] = {
                "reference": reference,
                "error": errors(made, held),
                "held": held,
            }
            if not arguments.no_speed:
                speed = measure_speed(model, prompt=32, tokens=24, rounds=arguments.rounds)
                if speed.memory is not None:
                    row["share"] = speed.reply.median * made.token_bytes / speed.memory.median
        rows.append(row)
        if not arguments.json:
            _show(row)
    if arguments.json:
        print(json.dumps(rows))


def _show(row: dict[str, Any]) -> None:
    print(row["reference"])
    for name, error in row["error"].items():
        size = row["held"].get(name, sum(row["held"].values()))
        print(f"  {name:<40}{size / 1e6:>10.2f} MB{error:>+9.2%}")
    if "share" in row:
        share = row["share"]
        print(
            f"  a reply reads weights at {share:.2f} of memory's speed; the forecast says {SHARE} "
            f"({LOWEST} to {HIGHEST}), and is off by {SHARE / share - 1:+.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
