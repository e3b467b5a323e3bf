"""What a kernel is, what it is given, and what it may do beyond multiplying.

Plugins import all of it from here.
"""

from __future__ import annotations

from gptq_loader_plugin.device import Device
from gptq_loader_plugin.kernel.capabilities import (
    Batcher,
    Closable,
    Finished,
    Finisher,
    FusedOperators,
    Joinable,
    Meter,
    PagedAttention,
    Stackable,
    TopLogitsHead,
    TopLogitsKernel,
    Tunable,
)
from gptq_loader_plugin.kernel.layer import LayerSpec, PackedLinear
from gptq_loader_plugin.kernel.protocol import Kernel
from gptq_loader_plugin.verdict import Accepted, Declined, Verdict

__all__ = [
    "Accepted",
    "Batcher",
    "Closable",
    "Declined",
    "Device",
    "Finished",
    "Finisher",
    "FusedOperators",
    "Joinable",
    "Kernel",
    "LayerSpec",
    "Meter",
    "PackedLinear",
    "PagedAttention",
    "Stackable",
    "TopLogitsHead",
    "TopLogitsKernel",
    "Tunable",
    "Verdict",
]
