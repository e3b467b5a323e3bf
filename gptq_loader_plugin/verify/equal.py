"""Check that a model answers the same however it runs: over several devices, and in a batch."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING

from gptq_loader_plugin.device import find_devices
from gptq_loader_plugin.verify.report import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from gptq_loader_plugin.generation.loaded import LoadedModel
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.plugins import Plugins

    _Picks = list[tuple[int, torch.Tensor]]

__all__ = ["PROMPT", "check_batch", "check_split", "first_logits", "split_map"]

TOKENS = 24  # of each reply
PROMPT = 32  # tokens
BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
# Relative root-mean-square difference of the logits: the same kernels give the same numbers, others
# round otherwise (1 to 2 % in bfloat16); one block that is lost gives 30 % and more.
TOLERANCE = 0.1
TIE = 0.02  # of the largest logit: bfloat16 rounds it by up to .004, and sums differ


def check_batch(model: LoadedModel, prompts: Sequence[Sequence[int]]) -> list[Finding]:
    """Write greedy replies alone and side by side: they must be the same, ties apart."""
    from gptq_loader_plugin.generation.batch import Batch
    from gptq_loader_plugin.generation.options import GenerateOptions

    options = GenerateOptions(temperature=0, max_new_tokens=TOKENS)
    alone: list[_Picks] = [[] for _ in prompts]
    for ids, picks in zip(prompts, alone, strict=True):
        for _ in model.stream_ids(ids, options, watch=_keep(picks)):
            pass
    together: list[_Picks] = [[] for _ in prompts]
    batch = Batch(model)
    for ids, picks in zip(prompts, together, strict=True):
        batch.add(model.begin(ids, options, watch=_keep(picks)))
    try:
        while len(batch):
            for _, piece in batch.step():
                if isinstance(piece, Exception):
                    raise piece
    finally:
        batch.close()
    for one, other in zip(alone, together, strict=True):
        at = _differs(one, other)
        if at is not None:
            words = [[token for token, _ in picks[at : at + 3]] for picks in (one, other)]
            return [
                Finding(
                    "batch",
                    wrong=True,
                    message="a reply is another in a batch than alone",
                    where=f"from token {at} on: {words[0]} alone, {words[1]} in a batch",
                    fix="report this, with gptq-loader explain; until then serve one request at a "
                    "time",
                )
            ]
    return []


def _differs(one: _Picks, other: _Picks) -> int | None:
    """Return where two replies part for more than rounding, which may turn a tie."""
    for at, (first, second) in enumerate(zip(one, other, strict=False)):
        (token, logits), (its, _) = first, second
        if token != its:
            gap = float(logits[token] - logits[its])
            return None if gap <= TIE * float(logits.abs().max()) else at
    return None if len(one) == len(other) else min(len(one), len(other))


def _keep(picks: _Picks) -> Callable[[int, torch.Tensor], object]:
    """Return what keeps each token that is picked, and the logits it is picked by."""
    return lambda token, logits: picks.append((token, logits.detach().float().flatten().cpu()))


def first_logits(model: LoadedModel, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits of a prompt, float32 [tokens, vocabulary], on the CPU."""
    import torch

    tokens = torch.tensor([list(ids)], device=model.model.device)
    with torch.inference_mode():
        logits: torch.Tensor = model.model(input_ids=tokens, use_cache=False).logits[0]
    return logits.float().cpu()


def split_map(layers: Sequence[str], first: str, second: str) -> dict[str, str] | None:
    """Place the second half of the blocks elsewhere; None for a model of one block."""
    blocks = {}
    for name in layers:
        if match := BLOCK.search(name):
            blocks[int(match[1])] = name[: match.end() - 1]
    if len(blocks) < 2:
        return None
    half = sorted(blocks)[len(blocks) // 2 :]
    return {"": first, **{blocks[number]: second for number in half}}


def check_split(
    path: Path,
    layers: Sequence[str],
    ids: Sequence[int],
    whole: torch.Tensor,
    options: LoadOptions,
    plugins: Plugins,
) -> list[Finding]:
    """Load the model over two places, and compare its logits with those of one.

    Args:
        path: the checkpoint.
        layers: the names of its layers.
        ids: a prompt.
        whole: the logits for it of the model on one device, float32 [tokens, vocabulary].
        options: how it is loaded on one device.
        plugins: the plugins in force.
    """
    from gptq_loader_plugin.loading import load

    names = [device.torch_name for device in find_devices() if device.type != "cpu"]
    first = names[0] if names else "cpu"
    second = next(iter(names[1:]), "cpu" if names else "disk")
    places = split_map(layers, first, second)
    if places is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        split = replace(
            options,
            device=None,
            device_map=places,
            offload_folder=folder,
            check=False,
            context=None,
        )
        with load(path, options=split, plugins=plugins) as model:
            logits = first_logits(model, ids)
    error = float((logits - whole).norm() / whole.norm().clamp_min(1e-12))
    if error <= TOLERANCE:
        return []
    return [
        Finding(
            "split",
            wrong=True,
            message=f"over {first} and {second} its logits differ by {error:.1%} from those of one "
            "device",
            where=", ".join(f"{name or 'the rest'}: {place}" for name, place in places.items())[
                :80
            ],
            fix="load it on one device, and report this with gptq-loader explain",
        )
    ]
