"""Measure which tile is fastest on a GPU, keep it in a file, and find it again.

The file lies in the cache folder, one for each kind of GPU. It is only ever a choice among the
tiles that `tiles.py` offers; anything else in it is refused in words, and the defaults stand.
Imports torch and triton only to measure.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from gptq_loader_kernels.triton.tiles import BUCKETS, Tile, candidates, default_tiles
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.system.atomic_file import write_whole
from gptq_loader_plugin.system.file_lock import changing
from gptq_loader_plugin.system.folders import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import torch

    from gptq_loader_plugin.kernel import Device, LayerSpec, PackedLinear

__all__ = ["chosen_tiles", "multiprocessors", "tune", "tuned_file"]

VERSION = 1  # of the file; another one is measured anew
OLDEST = (8, 0)  # whose tiles an interpreted kernel takes
INTERPRETED_MULTIPROCESSORS = 8  # enough that small layers are split
ROWS = {8: (1, 8), 16: (16,), 32: (32,), 64: (64,), BUCKETS[-1]: (256, 2048)}  # that stand for one

logger = logging.getLogger(__name__)


def tuned_file(device: Device) -> Path:
    """Give the file that keeps the choice for this kind of GPU."""
    name = re.sub(r"[^a-z0-9]+", "-", (device.name or str(device)).lower()).strip("-")
    return cache_folder() / "tuned" / f"triton-{name}.json"


def multiprocessors(device: Device) -> int:
    """Count the GPU's multiprocessors."""
    if device.type != "cuda":
        return INTERPRETED_MULTIPROCESSORS
    import torch

    return torch.cuda.get_device_properties(device.index).multi_processor_count


def chosen_tiles(device: Device, bits: int) -> tuple[Tile, ...]:
    """Give the tile of each bucket: the one that tuning kept for this GPU, or the default."""
    defaults = default_tiles(device.capability or OLDEST, bits)
    file = tuned_file(device)
    if not file.is_file():
        return defaults
    tuned = _read(file, file.stat().st_mtime_ns, device.capability or OLDEST)
    by_bucket = tuned.get(str(bits), {})
    return tuple(
        by_bucket.get(str(bucket), default)
        for bucket, default in zip(BUCKETS, defaults, strict=True)
    )


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
    shapes = list({_kind(it): it for it in layers}.values())
    total, done = len(shapes) * len(BUCKETS), 0
    capability = device.capability or OLDEST
    seconds: dict[tuple[int, int], dict[Tile, float]] = {}
    for layer in shapes:
        module = _random_module(layer, device)
        for place, bucket in enumerate(BUCKETS):
            progress(Progress("tune", done, total, "shapes", f"{layer}, {ROWS[bucket][-1]} rows"))
            spent = seconds.setdefault((layer.bits, bucket), {})
            for tile in candidates(capability, layer.bits, bucket):
                module.use(place, tile)
                for rows in ROWS[bucket]:
                    x = _input(rows, layer, device, module)
                    spent[tile] = spent.get(tile, 0.0) + measure(partial(module, x)) / rows
            done += 1
    progress(Progress("tune", total, total, "shapes"))
    best = {key: min(spent, key=lambda it: spent[it]) for key, spent in seconds.items()}
    file = _write(device, capability, best)
    usual = {key: candidates(capability, *key)[0] for key in best}
    changed = sum(best[key] != usual[key] for key in best)
    gain = max(spent[usual[key]] / spent[best[key]] for key, spent in seconds.items())
    return (
        f"{len(shapes)} shapes measured; {changed} of {len(best)} choices differ from the "
        f"defaults, the best by {100 * (gain - 1):.0f} %; kept in {file}"
    )


def _kind(layer: LayerSpec) -> tuple[object, ...]:
    return layer.bits, layer.in_features, layer.out_features, layer.group_rows, layer.scales_dtype


def _write(device: Device, capability: tuple[int, int], best: dict[tuple[int, int], Tile]) -> Path:
    """Add what was found to what the file keeps of other widths."""
    file = tuned_file(device)
    with changing(file):
        _replace(file, device, capability, best)
    return file


def _replace(
    file: Path, device: Device, capability: tuple[int, int], best: dict[tuple[int, int], Tile]
) -> None:
    kept = _read(file, file.stat().st_mtime_ns, capability) if file.is_file() else {}
    tiles = {
        bits: {bucket: asdict(tile) for bucket, tile in by_bucket.items()}
        for bits, by_bucket in kept.items()
    }
    for (bits, bucket), tile in best.items():
        tiles.setdefault(str(bits), {})[str(bucket)] = asdict(tile)
    data = {"version": VERSION, "gpu": device.name, "capability": list(capability), "tiles": tiles}
    write_whole(file, json.dumps(data, indent=2))


@cache
def _read(file: Path, changed: int, capability: tuple[int, int]) -> dict[str, dict[str, Tile]]:
    """Read a file of choices once each time it changes; warn and give none where it is damaged."""
    del changed
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        return dict(_parsed(data, capability))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning(
            "%s is not what tuning writes for this GPU (%s): the usual tiles are used; run "
            "gptq-loader tune again, or delete the file",
            file,
            error,
        )
        return {}


def _parsed(
    data: dict[str, Any], capability: tuple[int, int]
) -> Iterable[tuple[str, dict[str, Tile]]]:
    if data["version"] != VERSION or data["capability"] != list(capability):
        raise ValueError("it is of another version, or of another GPU")
    for bits, by_bucket in data["tiles"].items():
        tiles = {bucket: Tile(**fields) for bucket, fields in by_bucket.items()}
        for bucket, tile in tiles.items():
            allowed = (
                candidates(capability, int(bits), int(bucket)) if int(bucket) in BUCKETS else ()
            )
            if tile not in allowed:
                raise ValueError("it names a tile that is not on offer")
        yield bits, tiles


def _random_module(layer: LayerSpec, device: Device) -> Any:  # noqa: ANN401 - a TritonLinear
    """Make a layer of this shape: any codes take the same time."""
    from gptq_loader_kernels.triton.linear import TritonLinear

    plain = replace(layer, desc_act=False, bias=False, layout="continuous")
    return TritonLinear(
        plain,
        _random_tensors(plain),
        device.torch_name,
        tiles=default_tiles(device.capability or OLDEST, layer.bits),
        multiprocessors=multiprocessors(device),
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
