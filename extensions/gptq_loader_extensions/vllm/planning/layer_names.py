"""Map the layers of vLLM's model to those of the checkpoint."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import TensorMismatch, UnsupportedFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["LayerNames"]

BLOCK = re.compile(r"(.*?\.\d+)\..*")  # up to the first number: a layer of the model


class LayerNames:
    """The names of a checkpoint's quantised layers in vLLM's model.

    Args:
        layers: their names in the checkpoint.
        path: the checkpoint's, for messages.
    """

    def __init__(self, layers: Iterable[str], path: Path) -> None:
        self._stored = {name: name for name in layers}  # by the model's name
        self._path = path
        self._claimed: set[str] = set()

    def rename(self, mapper: Any) -> None:  # noqa: ANN401 - vLLM's WeightsMapper
        """Rename as the model renames tensors; a tensor that it drops keeps its name."""
        renamed = {}
        for name, stored in self._stored.items():
            tensor = mapper.map_name(f"{name}.qweight")
            renamed[name if tensor is None else tensor.removesuffix(".qweight")] = stored
        self._stored = renamed

    def claim(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
        """Return the checkpoint's layers that make up one of the model's; none where it is plain.

        Args:
            prefix: the model's name of its layer.
            fused: the layers that the model fuses: `qkv_proj` of `q_proj`, `k_proj` and `v_proj`.

        Raises:
            UnsupportedFormat: of the layers that are fused into one, only some are quantised.
        """
        parent, _, last = prefix.rpartition(".")
        names = [prefix]
        if prefix not in self._stored and last in fused:
            names = [f"{parent}.{part}" if parent else part for part in fused[last]]
        return self.claim_all(names)

    def claim_all(self, names: Sequence[str]) -> list[str]:
        """Return the checkpoint's layers by their names in the model: all, or none.

        Raises:
            UnsupportedFormat: only some are quantised.
        """
        layers = [self._stored[name] for name in names if name in self._stored]
        if layers and len(layers) < len(names):
            plain = next(name for name in names if name not in self._stored)
            raise UnsupportedFormat(
                f"{layers[0]} is quantised and {plain} is not; vLLM fuses the two into one layer",
                path=self._path,
                hint="load it with gptq-loader, or with transformers",
            )
        self._claimed.update(layers)
        return layers

    def unclaimed_in_blocks(self) -> list[str]:
        """List the checkpoint's layers that no module claimed, in blocks that the model has."""
        blocks = {_block(layer) for layer in self._claimed}
        return [
            layer
            for layer in self._stored.values()
            if layer not in self._claimed and (_block(layer) in blocks or "." not in layer)
        ]

    def claim_plain(self, layer: str) -> None:
        """Claim a layer of the checkpoint for a module that is not quantised."""
        self._claimed.add(layer)

    def check_claimed(self) -> list[str]:
        """Return the layers of modules that the model lacks, such as multi-token prediction.

        Raises:
            TensorMismatch: a layer has no place, though its block is in the model.
        """
        for name in self.unclaimed_in_blocks():
            raise TensorMismatch(
                f"{name} is quantised, and vLLM's model has no quantised layer there",
                path=self._path,
                tensor=f"{name}.qweight",
                hint="load it with gptq-loader, or with transformers",
            )
        return [layer for layer in self._stored.values() if layer not in self._claimed]


def _block(name: str) -> str:
    """Return the name of the block that a layer is in; outside of every block, its own."""
    match = BLOCK.fullmatch(name)
    return match[1] if match else name
