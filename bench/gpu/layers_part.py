"""Time one layer beside torch's float16 product, and against what the card's memory can do."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timing import launch_seconds, measure_bandwidth, seconds_a_call

from gptq_loader_plugin.kernel import LayerSpec, PackedLinear

if TYPE_CHECKING:
    from record import Record
    from where import Where

__all__ = ["AIM", "make_spec", "run"]

AIM = 0.85  # of the card's bandwidth, at 4 bits and 16 rows or fewer
ROWS = (1, 16, 64, 512, 4096)
BITS = (4, 3, 2, 8)
SIDES, TINY_SIDES = (4096, 11008), (128, 96)
GROUP = 128
BUFFER, TINY_BUFFER = 2 << 30, 1 << 20  # bytes, to measure memory with
CACHES = 4  # as many bytes of copies as so many of the card's caches
FEW = 64  # rows up to which a weight's bytes are most of the time
# A 16-bit product against float32 of the same weight: its x and y are rounded, and sums differ.
OFF = 5e-3


def run(record: Record, where: Where) -> None:
    """Measure memory and launches, then layers: 4 bits first."""
    rates = measure_bandwidth(where.device, TINY_BUFFER if where.tiny else BUFFER)
    bandwidth = max(rates.values())
    record.figure("memory", **rates, launch_seconds=launch_seconds(where.device))
    sides = TINY_SIDES if where.tiny else SIDES
    rows = ROWS[:2] if where.tiny else ROWS
    plain = _time_plain(record, where, sides, rows, bandwidth)
    for bits, act_order in itertools.product((4,) if where.tiny else BITS, (False, True)):
        if record.left < 0:
            record.check(f"{bits}-bit layers", passed=None, detail="no time was left")
            return
        with record.checking(f"a {bits}-bit layer"):
            layer = make_spec(sides, bits, act_order=act_order)
            _time_packed(record, where, layer, rows, plain, bandwidth)


def make_spec(sides: tuple[int, int], bits: Any, *, act_order: bool) -> LayerSpec:  # noqa: ANN401 - a width
    """Describe a symmetric layer in groups of 128."""
    middle = 1 << (bits - 1)
    return LayerSpec(
        name="model.layers.0.mlp.gate_proj",
        in_features=sides[0],
        out_features=sides[1],
        bits=bits,
        group_size=GROUP,
        desc_act=act_order,
        sym=True,
        groups=sides[0] // GROUP,
        group_rows=(GROUP, GROUP),
        group_unit=GROUP,
        zero_range=(middle, middle),
    )


def make_tensors(layer: LayerSpec) -> PackedLinear:
    """Make random codes for a layer, its zeros in the middle."""
    rows, table = layer.in_features, (layer.groups, layer.out_features)
    random = torch.Generator().manual_seed(layer.bits)
    sides = rows * layer.bits // 32, layer.out_features
    g_idx = torch.arange(rows) // GROUP
    if layer.desc_act:
        g_idx = g_idx[torch.randperm(rows, generator=random)]
    return PackedLinear(
        qweight=torch.randint(-(2**31), 2**31, sides, generator=random).to(torch.int32),
        zeros=torch.full(table, layer.zero_range[0], dtype=torch.uint8),
        scales=(0.01 + 0.01 * torch.rand(table, generator=random)).half(),
        g_idx=g_idx.to(torch.int32),
        bits=layer.bits,
    )


def _time_plain(
    record: Record, where: Where, sides: tuple[int, int], rows: tuple[int, ...], bandwidth: float
) -> dict[int, float]:
    """Time torch's own product in float16: seconds by the number of rows."""
    inputs, outputs = sides
    name = where.device.torch_name
    size = 2 * inputs * outputs
    weights = [
        torch.randn(outputs, inputs, device=name, dtype=torch.float16)
        for _ in range(_copies(where, size))
    ]
    seconds = {}
    for count in rows:
        x = torch.randn(count, inputs, device=name, dtype=torch.float16)
        calls = [partial(torch.nn.functional.linear, x, weight) for weight in weights]
        with torch.inference_mode():
            seconds[count] = seconds_a_call(calls, where.device)
        _note(record, "float16", sides, count, size, seconds[count], bandwidth, ratio=1.0)
    return seconds


def _time_packed(
    record: Record,
    where: Where,
    layer: LayerSpec,
    rows: tuple[int, ...],
    plain: dict[int, float],
    bandwidth: float,
) -> None:
    """Time every packed kernel on a layer, each answer held to float32 first."""
    name, sides = where.device.torch_name, (layer.in_features, layer.out_features)
    packed = make_tensors(layer)
    weight = packed.dequantize().to(name)
    for kernel in where.fused_kernels(layer):
        module = kernel.prepare(layer, packed, where.device)
        size = sum(it.numel() * it.element_size() for it in module.buffers())
        modules = [module]
        modules += [copy.deepcopy(module) for _ in range(_copies(where, size) - 1)]
        for count in rows:
            title = f"{kernel.name}, {layer}, {count} rows"
            with record.checking(title), torch.inference_mode():
                x = torch.randn(count, layer.in_features, device=name, dtype=torch.float16)
                right = x.float() @ weight.T
                error = float((module(x).float() - right).norm() / right.norm())
                record.check(title, passed=error <= OFF, detail=f"off by {error:.1e}")
                used = modules if count <= FEW else modules[:2]
                seconds = seconds_a_call([partial(it, x) for it in used], where.device)
                _note(
                    record, f"{kernel.name} {layer.bits}-bit" + " act" * layer.desc_act, sides,
                    count, size, seconds, bandwidth, ratio=plain[count] / seconds,
                )  # fmt: skip


def _note(
    record: Record,
    kernel: str,
    sides: tuple[int, int],
    rows: int,
    size: int,
    seconds: float,
    bandwidth: float,
    *,
    ratio: float,
) -> None:
    moved = size + 2 * rows * sum(sides)
    record.figure(
        "layer",
        kernel=kernel,
        inputs=sides[0],
        outputs=sides[1],
        rows=rows,
        seconds=seconds,
        share_of_memory=moved / seconds / bandwidth,
        teraflops=2 * rows * sides[0] * sides[1] / seconds / 1e12,
        times_float16=ratio,
    )


def _copies(where: Where, size: int) -> int:
    """Count the copies of a weight that no cache holds."""
    if not where.is_gpu:
        return 2
    properties: Any = torch.cuda.get_device_properties(where.device.index)
    cache = getattr(properties, "L2_cache_size", 64 << 20)
    return max(2, -(-CACHES * cache // size))
