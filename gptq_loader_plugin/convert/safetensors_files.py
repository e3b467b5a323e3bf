"""Write safetensors files a piece at a time: headers are known before any tensor is made."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from gptq_loader_plugin.convert.pieces import ConvertedLayer
from gptq_loader_plugin.events import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import BinaryIO

    import torch

    from gptq_loader_plugin.convert.pieces import Piece

__all__ = ["layer_of", "write_safetensors"]

INDEX = "model.safetensors.index.json"


def write_safetensors(
    pieces: Sequence[Piece],
    folder: Path,
    *,
    shard_bytes: int,
    progress: Callable[[Progress], None],
) -> list[ConvertedLayer]:
    """Write `model.safetensors`, or shards of it and their index; return what each layer became."""
    shards = _shards(pieces, shard_bytes)
    count = len(shards)
    names = ["model.safetensors"]
    if count > 1:
        names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    layers: list[ConvertedLayer] = []
    done = 0
    weight_map: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for piece in shard:
                progress(Progress("convert", done, len(pieces), "tensors", piece.name))
                layers += _write(piece, file)
                done += 1
            file.flush()
            os.fsync(file.fileno())
        weight_map |= {tensor: name for piece in shard for tensor in piece.infos}
    progress(Progress("convert", done, len(pieces), "tensors"))
    if count > 1:
        size = sum(piece.nbytes for piece in pieces)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return layers


def layer_of(piece: Piece, error: float) -> list[ConvertedLayer]:
    """Say what became of a layer; a piece that is none says nothing."""
    if piece.kind is None:
        return []
    return [ConvertedLayer(piece.name, piece.kind, error, piece.note if error else "")]


def _shards(pieces: Sequence[Piece], shard_bytes: int) -> list[list[Piece]]:
    """Divide pieces over files; in each, those that would leave the next unaligned come last."""
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return [sorted(shard, key=lambda piece: piece.nbytes % 8 != 0) for shard in shards]


def _header(shard: Sequence[Piece]) -> bytes:
    """Write the length and the header, padded so that what follows is aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in shard:
        for name, info in piece.infos.items():
            start, end = end, end + info.nbytes
            entries[name] = {
                "dtype": info.dtype,
                "shape": list(info.shape),
                "data_offsets": [start, end],
            }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(piece: Piece, file: BinaryIO) -> list[ConvertedLayer]:
    made = piece.make()
    file.writelines(_bytes(made.tensors[name]) for name in piece.infos)
    return layer_of(piece, made.error)


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
