"""Forecast what a checkpoint takes in memory, part by part, and how fast it will reply."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.checkpoint.vocabulary import EMBEDDINGS
from gptq_loader_plugin.kernel import Meter
from gptq_loader_plugin.planning.plan import make_plan
from gptq_loader_plugin.planning.top_logits import plan_top_logits

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.kernel import Device, Kernel
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["BANDWIDTHS", "Forecast", "forecast"]

# Replies of docs/benchmarks.md's whole models, by the share of memory's speed at which they read
# weights: 14 measurements on two cores of a Xeon, from .87 to 1.20 (a large cache serves a part).
SHARE, LOWEST, HIGHEST = 1.04, 0.87, 1.20
MEASURED_BYTES = 1 << 30
# Bytes a second that makers state for their memory.
BANDWIDTHS = {
    "RTX 3060": 360e9, "RTX 3070": 448e9, "RTX 3080": 760e9, "RTX 3090": 936e9,
    "RTX 4060 Ti": 288e9, "RTX 4070": 504e9, "RTX 4080": 717e9, "RTX 4090": 1008e9,
    "RTX 5080": 960e9, "RTX 5090": 1792e9, "T4": 320e9, "V100": 900e9, "A10": 600e9,
    "A6000": 768e9, "L4": 300e9, "L40S": 864e9, "A100 40GB": 1555e9, "A100 80GB": 2039e9,
    "H100 SXM": 3350e9, "H200": 4800e9, "RX 7900 XTX": 960e9, "MI300X": 5300e9,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a checkpoint will take, and how fast it will reply.

    Attributes:
        device: where.
        context: tokens of context.
        parts: bytes in memory, by what they are for.
        memory_bytes: all of them.
        token_bytes: the weights read for each token of a reply.
        bandwidth: bytes a second of the device's memory; None where nobody knows.
        bandwidth_source: how that is known.
        tokens_per_second: of a reply with an empty context; None where nobody knows.
        slowest: the same, at the lower end of what was measured; None for a bound.
        fastest: the same, at the upper end; for a device that was not measured, the bound.
        at_full_context: tokens a second once the context is full.
    """

    device: str
    context: int
    parts: dict[str, int]
    memory_bytes: int
    token_bytes: int
    bandwidth: float | None
    bandwidth_source: str
    tokens_per_second: float | None
    slowest: float | None
    fastest: float | None
    at_full_context: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the forecast as plain data, for `forecast --json`."""
        return asdict(self)


def forecast(
    checkpoint: Checkpoint,
    device: Device,
    kernels: Sequence[Kernel],
    *,
    context: int,
    gpu: str | None = None,
    bandwidth: float | None = None,
) -> Forecast:
    """Forecast memory and speed from headers.

    Args:
        checkpoint: the open checkpoint, or its outline.
        device: where it would run.
        kernels: the kernels to ask.
        context: tokens of context; no more than the model can have.
        gpu: one of `BANDWIDTHS`, for a device that is not here.
        bandwidth: bytes a second of the device's memory, where the user knows.

    Raises:
        NoBackend: there is a layer that no kernel runs there.
    """
    before = make_plan(checkpoint, device, kernels, reference=str(checkpoint.path))
    plan = plan_top_logits(before, checkpoint, kernels)
    context = min(context, plan.shape.context or context)
    parts = _parts(checkpoint, plan, copy=plan.weight_bytes - before.weight_bytes)
    kv_bytes = (plan.kv_bytes_per_token or 0) * context
    if kv_bytes:
        parts["keys and values"] = kv_bytes
    read = _read_a_token(checkpoint, plan, parts)
    rate, source = _bandwidth(plan, kernels, gpu, bandwidth)
    measured = device.type == "cpu"
    at_empty = None if rate is None else rate / read
    return Forecast(
        device=str(device),
        context=context,
        parts=parts,
        memory_bytes=sum(parts.values()),
        token_bytes=read,
        bandwidth=rate,
        bandwidth_source=source,
        tokens_per_second=at_empty and at_empty * (SHARE if measured else 1),
        slowest=at_empty * LOWEST if at_empty and measured else None,
        fastest=at_empty and at_empty * (HIGHEST if measured else 1),
        at_full_context=rate and rate / (read + kv_bytes) * (SHARE if measured else 1),
    )


def _parts(checkpoint: Checkpoint, plan: Plan, *, copy: int) -> dict[str, int]:
    size = 4 if plan.dtype == "float32" else 2
    packed = sum(choice.chosen.prepared_bytes for choice in plan.choices)
    embeddings = size * sum(
        prod(info.shape) for name, info in checkpoint.headers.items() if _is_embedding(name)
    )
    rest = plan.weight_bytes - copy - packed - embeddings
    parts = {
        "quantised layers": packed,
        "embedding": embeddings,
        "head, norms and what is not quantised": rest,
        "the head's copy in 8 bits": copy,
        "scratch": plan.scratch_bytes,
    }
    return {name: count for name, count in parts.items() if count}


def _is_embedding(name: str) -> bool:
    module, _, part = name.rpartition(".")
    return part == "weight" and module.rpartition(".")[2] in EMBEDDINGS


def _read_a_token(checkpoint: Checkpoint, plan: Plan, parts: dict[str, int]) -> int:
    """Count the weights of one token: of an embedding a row, of a mixture the experts in use."""
    config = checkpoint.model_config
    tied = bool(config.get("tie_word_embeddings")) and "lm_head.weight" not in checkpoint.headers
    copy = parts.get("the head's copy in 8 bits", 0)
    read = plan.weight_bytes
    size = 4 if plan.dtype == "float32" else 2
    head = checkpoint.headers.get("lm_head.weight")
    if copy:  # the head itself is read for a few rows alone
        read -= parts["embedding"] + (0 if tied or head is None else size * prod(head.shape))
    elif not tied:
        read -= parts.get("embedding", 0)
    experts = sum(
        choice.chosen.prepared_bytes for choice in plan.choices if ".experts." in choice.layer.name
    )
    every = next(
        (config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts")
         if isinstance(config.get(key), int)), 0,
    )  # fmt: skip
    used = config.get("num_experts_per_tok")
    if experts and every and isinstance(used, int):
        read -= experts * (every - used) // every
    return max(read, 1)


def _bandwidth(
    plan: Plan, kernels: Sequence[Kernel], gpu: str | None, bandwidth: float | None
) -> tuple[float | None, str]:
    if bandwidth is not None:
        return bandwidth, "as you say"
    if gpu is not None:
        return BANDWIDTHS[gpu], f"its maker's figure for {gpu}"
    if not plan.device.present:
        return None, "not known: name the GPU, or its bandwidth"
    chosen = plan.kernels()
    for kernel in kernels:
        if kernel.name in chosen and isinstance(kernel, Meter):
            rate = kernel.read_bandwidth(MEASURED_BYTES, plan.device)
            if rate is not None:
                return rate, "measured here"
    return None, "not known: no kernel measures it"
