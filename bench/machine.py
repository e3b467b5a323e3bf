"""Say what machine figures are from."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from gptq_loader_plugin.device import find_device

__all__ = ["Machine", "describe"]


@dataclass(frozen=True, slots=True)
class Machine:
    """What figures depend on."""

    processor: str
    features: tuple[str, ...]
    processors: int
    threads: int
    torch: str

    def __str__(self) -> str:
        """Say it in a line, for above a table."""
        return (
            f"{self.processor} ({' '.join(self.features)}), {self.threads} threads of "
            f"{self.processors} processors, torch {self.torch}"
        )


def describe(threads: int | None = None) -> Machine:
    """Describe this machine and the threads in use."""
    device = find_device("cpu")
    processors = len(os.sched_getaffinity(0))
    return Machine(
        processor=device.name,
        features=tuple(sorted(device.features)),
        processors=processors,
        threads=threads or processors,
        torch=torch.__version__,
    )
