"""Capture each kernel's product in a graph: no synchronisation, no allocation, the same answer."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from checkpoints import make_llama
from models_part import prompts_of
from timing import capture, synchronize

import gptq_loader_plugin as gptq
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.generation.batch import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from record import Record
    from where import Where


__all__ = ["run"]

ROWS = (1, 16, 64, 512)
BITS = (2, 3, 4, 8)
SIDES, TINY_SIDES = (1024, 768), (128, 64)
REPLAYS = 20
SEQUENCES, WARM_STEPS, STEPS = 4, 8, 16  # of a whole model
FLAT = 1 << 16  # bytes that more tokens of a reply may take
OFF = 2e-3  # a library may choose another algorithm while it is captured


def run(record: Record, where: Where) -> None:
    """Capture the products, then watch a whole model's steps."""
    rows = ROWS[:1] if where.tiny else ROWS
    bits_of = (4,) if where.tiny else BITS
    for bits, act_order in itertools.product(bits_of, (False, True)):
        sides = TINY_SIDES if where.tiny else SIDES
        case = Case(bits=bits, act_order=act_order, group_size=64, rows=sides[0], columns=sides[1])
        layer, packed, _ = make_layer(case)
        for kernel in where.fused_kernels(layer):
            name = f"{kernel.name}, {layer}"
            with record.checking(name):
                module = kernel.prepare(layer, packed, where.device)
                for count in rows:
                    x = torch.randn(count, case.rows).to(where.device.torch_name, torch.float16)
                    _hold(record, where, f"{name}, {count} rows", module, x)
    with record.checking("a whole model's steps"):
        _watch_steps(record, where)


@torch.inference_mode()
def _hold(
    record: Record, where: Where, name: str, module: torch.nn.Module, x: torch.Tensor
) -> None:
    y = module(x)  # compiles
    synchronize(where.device)
    with _no_synchronisation(where):
        module(x)
    kept: dict[str, torch.Tensor] = {}

    def call() -> None:
        kept["y"] = module(x)

    replay = capture(call, where.device)
    other = torch.randn(x.shape).to(x)
    right = module(other).float()
    x.copy_(other)
    replay()
    synchronize(where.device)
    error = float((kept["y"].float() - right).norm() / right.norm())
    before = _memory(where)
    for _ in range(REPLAYS if where.is_gpu else 0):
        replay()
    synchronize(where.device)
    after = _memory(where)
    words = f"off by {error:.1e} from a call; memory {before} before replays, {after} after"
    record.check(
        name, passed=error <= OFF and before == after and y.isfinite().all().item(), detail=words
    )


def _memory(where: Where) -> tuple[int, int]:
    """Return the bytes that are held, and how many allocations there have been."""
    if not where.is_gpu:
        return 0, 0
    stats: dict[str, Any] = torch.cuda.memory_stats(where.device.index)
    return stats["allocated_bytes.all.current"], stats["allocation.all.allocated"]


@contextmanager
def _no_synchronisation(where: Where) -> Iterator[None]:
    """Make every wait for the device an error."""
    if not where.is_gpu:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _watch_steps(record: Record, where: Where) -> None:
    """Count what a step of several sequences takes: launches, allocations, memory that stays."""
    path = make_llama(where.folder / "checkpoints" / "llama-steps", layers=1 if where.tiny else 2)
    with where.load(path) as model:
        if model.engine is not None:
            model.keep(SEQUENCES)
        batch = Batch(model)
        options = gptq.GenerateOptions(max_new_tokens=WARM_STEPS + 2 * STEPS + 8, temperature=0)
        for ids in prompts_of((20,) * SEQUENCES, 256):
            batch.add(model.begin(ids, options))
        _steps(batch, WARM_STEPS)
        synchronize(where.device)
        before = _memory(where)
        _steps(batch, STEPS)
        synchronize(where.device)
        after = _memory(where)
        counts = _profile(batch, where) if where.is_gpu else {}
        engine = model.engine is not None
        batch.close()
        record.figure(
            "steps",
            sequences=SEQUENCES,
            layers=model.model.config.num_hidden_layers,
            engine=engine,
            allocations_a_step=(after[1] - before[1]) / STEPS,
            bytes_kept_a_step=(after[0] - before[0]) / STEPS,
            notes=list(model.notes),
            **counts,
        )
        if not where.is_gpu or not engine:
            why = "there is no GPU" if not where.is_gpu else "each sequence takes its own step"
            record.check("steps: memory is flat", passed=None, detail=why)
            return
        launches = counts["graph_launches_a_step"]
        detail = f"{launches:.1f} graphs and {counts['launches_a_step']:.1f} kernels a step"
        record.check("steps: launched as a graph", passed=launches >= 1, detail=detail)
        kept = after[0] - before[0]
        record.check(
            "steps: memory is flat", passed=kept <= FLAT, detail=f"{kept} bytes in {STEPS} steps"
        )


def _steps(batch: Batch, count: int) -> None:
    for _ in range(count):
        for _, piece in batch.step():
            if isinstance(piece, Exception):
                raise piece


def _profile(batch: Batch, where: Where) -> dict[str, float]:
    """Count, for each step, kernels that ran, launches by the host, and waits for the device."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        _steps(batch, STEPS)
        synchronize(where.device)
    counts = {"kernels": 0, "launches": 0, "graph_launches": 0, "waits": 0}
    for event in profiler.events() or ():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        counts["kernels"] += on_device and not event.name.startswith(("Memcpy", "Memset"))
        counts["launches"] += "LaunchKernel" in event.name
        counts["graph_launches"] += "GraphLaunch" in event.name
        counts["waits"] += "Synchronize" in event.name
    return {f"{key}_a_step": value / STEPS for key, value in counts.items()}
