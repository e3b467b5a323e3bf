"""Capture calls in graphs, time them by the GPU's own clock, and measure what the card can do."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_plugin.device import Device

__all__ = ["capture", "launch_seconds", "measure_bandwidth", "seconds_a_call", "synchronize"]

ROUNDS = 5
ROUND_SECONDS = 0.02  # of replays between two looks at the clock
LAUNCHES = 256  # kernels in the graph that measures what one costs


def synchronize(device: Device) -> None:
    """Wait until the device has done all it was told."""
    if device.type != "cpu":
        torch.cuda.synchronize(device.index)


def capture(call: Callable[[], object], device: Device) -> Callable[[], object]:
    """Capture a call as a CUDA graph and return its replay; on a CPU, the call itself."""
    if device.type == "cpu":
        return call
    stream = torch.cuda.Stream(device.index)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def seconds_a_call(calls: Sequence[Callable[[], object]], device: Device) -> float:
    """Time a call: all of them in turn, captured in one graph, the median of several rounds.

    Args:
        calls: the same work on copies of its data, enough that no cache holds them.
        device: where they run.
    """

    def all_of_them() -> None:
        for call in calls:
            call()

    replay = capture(all_of_them, device)
    once = _seconds(replay, 1, device)
    count = max(1, min(200, int(ROUND_SECONDS / max(once, 1e-7))))
    rounds = ROUNDS if device.type != "cpu" else 1
    return statistics.median(_seconds(replay, count, device) for _ in range(rounds)) / len(calls)


def measure_bandwidth(device: Device, size: int) -> dict[str, float]:
    """Measure memory, in bytes a second: of a copy, both ways counted, and of reading alone."""
    source = torch.ones(size // 4, dtype=torch.float32, device=device.torch_name)
    target = torch.empty_like(source)
    copied = seconds_a_call([lambda: target.copy_(source)], device)
    read = seconds_a_call([source.sum], device)
    return {"copy": 2 * size / copied, "read": size / read}


def launch_seconds(device: Device) -> float:
    """Measure what a kernel in a graph takes that has next to nothing to do."""
    one = torch.zeros(1, device=device.torch_name)

    def launch() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    return seconds_a_call([launch], device) / LAUNCHES


def _seconds(call: Callable[[], object], count: int, device: Device) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - began) / count
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device.index)
    before.record()
    for _ in range(count):
        call()
    after.record()
    torch.cuda.synchronize(device.index)
    return before.elapsed_time(after) / 1000 / count
