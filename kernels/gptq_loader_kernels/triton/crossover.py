"""From how many rows of x on dequantise-and-matmul beats decoding inside it: a model. No torch.

docs/kernels/triton.md derives it. Per weight, decoding inside the matmul reads the packed bytes
once, and decodes them again for every tile of rows; dequantising reads them, writes 16 bits and
reads those. Tuning measures what this only estimates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from gptq_loader_kernels.triton.tiles import Kind, default_tiles, has_tensor_cores

__all__ = ["INSTRUCTIONS", "NEVER", "default_crossover", "gpu_of"]

NEVER = 1 << 30  # rows: more than any product has
LARGEST = 16_384  # rows that the model looks at
REACHED = 0.8  # of the peak, by large products of cuBLAS and hipBLASLt; an assumption
TABLE_BYTES = 4 / 128  # of a weight: a scale and a zero for 128 rows


@dataclass(frozen=True, slots=True)
class Gpu:
    """The figures of one GPU, from its maker's data sheet, that stand for its kind.

    Attributes:
        name: of the GPU.
        bandwidth: of its memory, in bytes a second.
        matmul: its peak in 16-bit products summed in float32, in operations a second.
        issue: instructions of a thread that all its multiprocessors issue in a second.
    """

    name: str
    bandwidth: float
    matmul: float
    issue: float


GPUS: dict[Kind, Gpu] = {
    (7, 0): Gpu("V100", 0.9e12, 125e12, 80 * 128 * 1.53e9),
    (7, 5): Gpu("T4", 0.32e12, 65e12, 40 * 128 * 1.59e9),
    (8, 0): Gpu("A100 80 GB", 2.04e12, 312e12, 108 * 128 * 1.41e9),
    (8, 6): Gpu("RTX 3090", 0.936e12, 71e12, 82 * 128 * 1.70e9),
    (8, 9): Gpu("RTX 4090", 1.008e12, 165e12, 128 * 128 * 2.52e9),
    (9, 0): Gpu("H100 SXM", 3.35e12, 989e12, 132 * 128 * 1.98e9),
    (10, 0): Gpu("B200", 8.0e12, 2250e12, 148 * 128 * 1.97e9),
    (12, 0): Gpu("RTX 5090", 1.79e12, 210e12, 170 * 128 * 2.41e9),
    "gfx90a": Gpu("MI250X, one die", 1.64e12, 191e12, 110 * 64 * 1.70e9),
    "gfx942": Gpu("MI300X", 5.3e12, 1307e12, 304 * 64 * 2.10e9),
    "gfx1100": Gpu("RX 7900 XTX", 0.96e12, 123e12, 96 * 64 * 2.50e9),
}

# Instructions of the main loop for each weight, by width: of the default tile for the most rows,
# in float16 and groups of 128, as `make aot` counts them, which fails where these are off.
INSTRUCTIONS: dict[Kind, dict[int, float]] = {
    (7, 0): {2: 36.0, 3: 36.0, 4: 36.0, 8: 36.0},
    (7, 5): {2: 36.0, 3: 36.0, 4: 36.0, 8: 36.0},
    (8, 0): {2: 4.8, 3: 4.8, 4: 5.1, 8: 7.0},
    (8, 6): {2: 4.8, 3: 4.8, 4: 5.1, 8: 7.4},
    (8, 9): {2: 4.8, 3: 4.8, 4: 5.1, 8: 7.4},
    (9, 0): {2: 8.5, 3: 4.0, 4: 7.5, 8: 7.7},
    (10, 0): {2: 5.6, 3: 5.3, 4: 6.2, 8: 10.9},
    (12, 0): {2: 4.8, 3: 4.9, 4: 5.0, 8: 8.2},
    "gfx90a": {2: 28.1, 3: 12.7, 4: 19.8, 8: 19.8},
    "gfx942": {2: 28.3, 3: 14.2, 4: 19.5, 8: 18.6},
    "gfx1100": {2: 21.6, 3: 22.7, 4: 20.7, 8: 20.8},
}


def gpu_of(kind: Kind) -> Kind:
    """Return the kind that the model knows and that is nearest to `kind`."""
    if isinstance(kind, str):
        if kind in GPUS:
            return kind
        return "gfx942" if kind.startswith("gfx9") else "gfx1100"
    older = [it for it in GPUS if not isinstance(it, str) and it <= kind]
    return max(older, default=(7, 0))


@cache
def default_crossover(kind: Kind, bits: int) -> int:
    """Work out from how many rows on a weight of `bits` is dequantised on one kind of GPU."""
    kind = gpu_of(kind)
    step = default_tiles(kind, bits)[-1].block_m
    fused = [
        rows
        for rows in range(step, LARGEST + 1, step)
        if _fused(kind, bits, rows, step) < _dequantized(kind, bits, rows)
    ]
    most = max(fused, default=0)
    return NEVER if most + step > LARGEST else most + 1


def _fused(kind: Kind, bits: int, rows: int, step: int) -> float:
    """Estimate the seconds of one weight, decoded inside the matmul."""
    gpu = GPUS[kind]
    decoded = -(-rows // step) * INSTRUCTIONS[kind][bits] / gpu.issue
    multiplied = 2 * rows / (REACHED * gpu.matmul) if has_tensor_cores(kind) else 0.0
    return max((bits / 8 + TABLE_BYTES) / gpu.bandwidth, decoded + multiplied)


def _dequantized(kind: Kind, bits: int, rows: int) -> float:
    """Estimate the seconds of one weight, dequantised to 16 bits and multiplied by those."""
    gpu = GPUS[kind]
    written = (bits / 8 + TABLE_BYTES + 2) / gpu.bandwidth
    return written + max(2 / gpu.bandwidth, 2 * rows / (REACHED * gpu.matmul))
