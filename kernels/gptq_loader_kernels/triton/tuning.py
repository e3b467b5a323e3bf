"""Measure which tiles and crossovers are fastest on a GPU, keep them in a file, and find them.

The file lies in the cache folder, one for each kind of GPU. Its tiles are only ever a choice among
those that `tiles.py` offers; anything else in it is refused in words, and the defaults stand. Its
crossovers are rows of x, for each width and shape that was measured.
Imports torch and triton only to measure.
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_left
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from gptq_loader_kernels.triton.crossover import NEVER, default_crossover
from gptq_loader_kernels.triton.tiles import (
    BUCKETS,
    ROW_BUCKETS,
    Kind,
    Tile,
    buckets,
    candidates,
    default_tiles,
    has_tensor_cores,
    kind_of,
)
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.system.atomic_file import write_whole
from gptq_loader_plugin.system.file_lock import changing
from gptq_loader_plugin.system.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import torch

    from gptq_loader_plugin.kernel import Device, LayerSpec, PackedLinear

__all__ = ["chosen_crossover", "chosen_tiles", "multiprocessors", "tune", "tuned_file"]

VERSION = 2  # of the file
READ = (1, 2)  # versions that are read; the first has no crossovers
INTERPRETED_MULTIPROCESSORS = 8  # enough that small layers are split
# Rows of x that stand for a bucket, with tensor cores and without.
ROWS = {8: (1, 8), 16: (16,), 32: (32,), 64: (64,), BUCKETS[-1]: (256, 2048)}
FEW_ROWS = {1: (1,), 2: (2,), 4: (4,), 8: (8,), ROW_BUCKETS[-1]: (16, 64)}
# Rows of x that may be a crossover.
CROSSOVERS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
FEW_CROSSOVERS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a file keeps of one GPU.

    Attributes:
        tiles: the fastest, by width and bucket.
        crossovers: from how many rows on a weight is dequantised, by width and "KxN".
    """

    tiles: dict[str, dict[str, Tile]] = field(default_factory=dict)
    crossovers: dict[str, dict[str, int]] = field(default_factory=dict)


def tuned_file(device: Device) -> Path:
    """Give the file that keeps the choice for this kind of GPU."""
    name = re.sub(r"[^a-z0-9]+", "-", (device.name or str(device)).lower()).strip("-")
    return cache_folder() / "tuned" / f"triton-{name}.json"


def multiprocessors(device: Device) -> int:
    """Count the GPU's multiprocessors."""
    if device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    import torch

    return torch.cuda.get_device_properties(device.index).multi_processor_count


def chosen_tiles(device: Device, bits: int) -> tuple[Tile, ...]:
    """Return the tile of each bucket: the one that tuning kept for this GPU, or the default."""
    kind = kind_of(device)
    by_bucket = _tuned(device).tiles.get(str(bits), {})
    return tuple(
        by_bucket.get(str(bucket), default)
        for bucket, default in zip(buckets(kind), default_tiles(kind, bits), strict=True)
    )


def chosen_crossover(layer: LayerSpec, device: Device) -> int:
    """Return from how many rows on a layer is dequantised: as tuning kept, or by the model."""
    by_shape = _tuned(device).crossovers.get(str(layer.bits), {})
    return by_shape.get(_shape(layer)) or default_crossover(kind_of(device), layer.bits)


def tune(
    layers: Sequence[LayerSpec],
    device: Device,
    progress: Callable[[Progress], None],
    *,
    measure: Callable[[Callable[[], object]], float] | None = None,
) -> str:
    """Measure every tile on layers of these shapes, and keep the fastest of each bucket.

    Args:
        layers: layers the kernel accepted; each shape is measured once.
        device: the GPU.
        progress: hears how far the work has come.
        measure: how to time a call, in seconds; the GPU's own clock unless given.

    Returns:
        What was found, in words, and the file that keeps it.
    """
    measure = measure or _measure_on_gpu
    kind = kind_of(device)
    rows_of = ROWS if has_tensor_cores(kind) else FEW_ROWS
    shapes = list({_kind(it): it for it in layers}.values())
    modules = [_random_module(it, device) for it in shapes]
    total, done = len(shapes) * (len(rows_of) + 1), 0
    seconds: dict[tuple[int, int], dict[Tile, float]] = {}
    for layer, module in zip(shapes, modules, strict=True):
        for place, bucket in enumerate(buckets(kind)):
            words = f"{layer}, {rows_of[bucket][-1]} rows"
            progress(Progress("tune", done, total, "shapes", words))
            spent = seconds.setdefault((layer.bits, bucket), {})
            for tile in candidates(kind, layer.bits, bucket):
                module.use(place, tile)
                for rows in rows_of[bucket]:
                    x = _input(rows, layer, device, module)
                    spent[tile] = spent.get(tile, 0.0) + measure(partial(module, x)) / rows
            done += 1
    best = {key: min(spent, key=lambda it: spent[it]) for key, spent in seconds.items()}
    crossovers: dict[tuple[int, str], int] = {}
    for layer, module in zip(shapes, modules, strict=True):
        progress(Progress("tune", done, total, "shapes", f"{layer}, crossover"))
        for place, bucket in enumerate(buckets(kind)):
            module.use(place, best[layer.bits, bucket])
        crossovers[layer.bits, _shape(layer)] = _crossover(layer, device, module, measure)
        done += 1
    progress(Progress("tune", total, total, "shapes"))
    file = _write(device, kind, best, crossovers)
    usual = {key: candidates(kind, *key)[0] for key in best}
    changed = sum(best[key] != usual[key] for key in best)
    gain = max(spent[usual[key]] / spent[best[key]] for key, spent in seconds.items())
    return (
        f"{len(shapes)} shape{'s' * (len(shapes) > 1)} measured; {changed} of {len(best)} choices "
        f"differ from the defaults, the best by {100 * (gain - 1):.0f} %; "
        f"{_words(crossovers.values())}; kept in {file}"
    )


def _crossover(
    layer: LayerSpec,
    device: Device,
    module: Any,  # noqa: ANN401 - a TritonLinear
    measure: Callable[[Callable[[], object]], float],
) -> int:
    """Find the fewest rows from which on dequantising is faster; it stays so above them."""
    offered = CROSSOVERS if module.tensor_cores else FEW_CROSSOVERS

    def dequantizing_wins(rows: int) -> bool:
        x = _input(rows, layer, device, module)
        module.crossover = NEVER
        fused = measure(partial(module, x))
        module.crossover = 1
        return measure(partial(module, x)) < fused

    place = bisect_left(offered, 1, key=dequantizing_wins)
    return offered[place] if place < len(offered) else NEVER


def _words(crossovers: Iterable[int]) -> str:
    """Say from how many rows on the shapes are dequantised."""
    found = sorted({it for it in crossovers if it != NEVER})
    if not found:
        return "never dequantised"
    ends = dict.fromkeys((found[0], found[-1]))
    return f"dequantised from {' to '.join(map(str, ends))} rows on"


def _shape(layer: LayerSpec) -> str:
    return f"{layer.in_features}x{layer.out_features}"


def _kind(layer: LayerSpec) -> tuple[object, ...]:
    return layer.bits, layer.in_features, layer.out_features, layer.group_rows, layer.scales_dtype


def _write(
    device: Device,
    kind: Kind,
    best: dict[tuple[int, int], Tile],
    crossovers: dict[tuple[int, str], int],
) -> Path:
    """Add what was measured to what the file keeps of other widths and shapes."""
    file = tuned_file(device)
    with changing(file):
        kept = _read(file, file.stat().st_mtime_ns, kind) if file.is_file() else Tuned()
        tiles = {
            bits: {bucket: asdict(tile) for bucket, tile in by_bucket.items()}
            for bits, by_bucket in kept.tiles.items()
        }
        for (bits, bucket), tile in best.items():
            tiles.setdefault(str(bits), {})[str(bucket)] = asdict(tile)
        rows = {bits: dict(by_shape) for bits, by_shape in kept.crossovers.items()}
        for (bits, shape), crossover in crossovers.items():
            rows.setdefault(str(bits), {})[shape] = crossover
        data = {
            "version": VERSION,
            "gpu": device.name,
            "capability": _plain(kind),
            "tiles": tiles,
            "crossovers": rows,
        }
        write_whole(file, json.dumps(data, indent=2))
    return file


def _plain(kind: Kind) -> list[int] | str:
    """Write a kind of GPU as JSON has it."""
    return kind if isinstance(kind, str) else list(kind)


def _tuned(device: Device) -> Tuned:
    """Read what tuning kept for this GPU; nothing where it did not run."""
    file = tuned_file(device)
    return _read(file, file.stat().st_mtime_ns, kind_of(device)) if file.is_file() else Tuned()


@cache
def _read(file: Path, changed: int, kind: Kind) -> Tuned:
    """Read a file of choices once each time it changes; warn and give none where it is damaged."""
    del changed
    try:
        return _parsed(json.loads(file.read_text(encoding="utf-8")), kind)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning(
            "%s is not what tuning writes for this GPU (%s): the usual tiles are used; run "
            "gptq-loader tune again, or delete the file",
            file,
            error,
        )
        return Tuned()


def _parsed(data: dict[str, Any], kind: Kind) -> Tuned:
    if data["version"] not in READ or data["capability"] != _plain(kind):
        raise ValueError("it is of another version, or of another GPU")
    return Tuned(dict(_tiles(data["tiles"], kind)), dict(_crossovers(data)))


def _tiles(data: dict[str, Any], kind: Kind) -> Iterable[tuple[str, dict[str, Tile]]]:
    for bits, by_bucket in data.items():
        tiles = {bucket: Tile(**fields) for bucket, fields in by_bucket.items()}
        for bucket, tile in tiles.items():
            allowed = (
                candidates(kind, int(bits), int(bucket)) if int(bucket) in buckets(kind) else ()
            )
            if tile not in allowed:
                raise ValueError("it names a tile that is not on offer")
        yield bits, tiles


def _crossovers(data: dict[str, Any]) -> Iterable[tuple[str, dict[str, int]]]:
    kept = data["crossovers"] if data["version"] >= VERSION else {}
    for bits, by_shape in kept.items():
        if not all(isinstance(rows, int) and rows > 0 for rows in by_shape.values()):
            raise ValueError("a crossover in it is no number of rows")
        yield bits, dict(by_shape)


def _random_module(layer: LayerSpec, device: Device) -> Any:  # noqa: ANN401 - a TritonLinear
    """Make a layer of this shape: any codes take the same time."""
    from gptq_loader_kernels.triton.linear import TritonLinear

    plain = replace(layer, desc_act=False, bias=False, layout="continuous")
    return TritonLinear(
        plain,
        _random_tensors(plain),
        device.torch_name,
        tiles=default_tiles(kind_of(device), layer.bits),
        multiprocessors=multiprocessors(device),
        tensor_cores=has_tensor_cores(kind_of(device)),
    )


def _random_tensors(layer: LayerSpec) -> PackedLinear:
    import torch

    from gptq_loader_plugin.kernel import PackedLinear

    rows, columns, groups = layer.in_features, layer.out_features, layer.groups
    random = torch.Generator().manual_seed(0)
    words = (rows * layer.bits // 32, columns)
    return PackedLinear(
        qweight=torch.randint(-(2**31), 2**31, words, generator=random).to(torch.int32),
        zeros=torch.full((groups, columns), 1 << (layer.bits - 1), dtype=torch.uint8),
        scales=torch.full((groups, columns), 0.01, dtype=getattr(torch, layer.scales_dtype)),
        g_idx=(torch.arange(rows) // layer.group_rows[1]).clamp(max=groups - 1).to(torch.int32),
        bits=layer.bits,
    )


def _input(rows: int, layer: LayerSpec, device: Device, module: Any) -> torch.Tensor:  # noqa: ANN401
    import torch

    random = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, layer.in_features, generator=random)
    return x.to(device.torch_name, module.dtype)


def _measure_on_gpu(call: Callable[[], object]) -> float:
    """Time a call in seconds: the median of many, the cache flushed between them."""
    from triton.testing import do_bench

    measured: Any = do_bench(call, return_mode="median")
    return float(measured) / 1000
