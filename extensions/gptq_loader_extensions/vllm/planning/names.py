"""Find the checkpoint's layers behind a layer of vLLM's model, and those behind none."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import TensorMismatch, UnsupportedFormat

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = ["Names"]

BLOCK = re.compile(r"(.*?\.\d+)\..*")  # up to the first number: a layer of the model


class Names:
    """The names of a checkpoint's quantised layers, as vLLM's model has them.

    Args:
        layers: their names in the checkpoint.
        path: the checkpoint's, for messages.
    """

    def __init__(self, layers: Iterable[str], path: Path) -> None:
        self._stored = {name: name for name in layers}  # by the model's name
        self._path = path
        self._claimed: set[str] = set()

    def rename(self, mapper: Any) -> None:  # noqa: ANN401 - vLLM's WeightsMapper
        """Rename as the model renames tensors; what it drops keeps its name."""
        renamed = {}
        for name, stored in self._stored.items():
            tensor = mapper.map_name(f"{name}.qweight")
            renamed[name if tensor is None else tensor.removesuffix(".qweight")] = stored
        self._stored = renamed

    def claim(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> list[str]:
        """Name the checkpoint's layers that make up one of the model's: none where it is plain.

        Args:
            prefix: the model's name of its layer.
            fused: what the model joins: `qkv_proj` of `q_proj`, `k_proj` and `v_proj`.

        Raises:
            UnsupportedFormat: some of what is joined is quantised, and some is not.
        """
        parent, _, last = prefix.rpartition(".")
        wanted = [prefix]
        if prefix not in self._stored and last in fused:
            wanted = [f"{parent}.{it}" if parent else it for it in fused[last]]
        return self.claim_all(wanted)

    def claim_all(self, wanted: Sequence[str]) -> list[str]:
        """Name the checkpoint's layers of these names of the model: all, or none.

        Raises:
            UnsupportedFormat: some are quantised, and some are not.
        """
        found = [self._stored[it] for it in wanted if it in self._stored]
        if found and len(found) < len(wanted):
            plain = next(it for it in wanted if it not in self._stored)
            raise UnsupportedFormat(
                f"{found[0]} is quantised and {plain} is not; vLLM joins the two in one layer",
                path=self._path,
                hint="load it with gptq-loader, or with transformers",
            )
        self._claimed.update(found)
        return found

    def check_claimed(self) -> list[str]:
        """List the layers of parts that the model lacks, such as one that guesses tokens ahead.

        Raises:
            TensorMismatch: a layer has no place, though its block is in the model.
        """
        blocks = {_block(it) for it in self._claimed}
        left = [it for it in self._stored.values() if it not in self._claimed]
        for name in left:
            if _block(name) in blocks or "." not in name:
                raise TensorMismatch(
                    f"{name} is quantised, and vLLM's model has no quantised layer there",
                    path=self._path,
                    tensor=f"{name}.qweight",
                    hint="load it with gptq-loader, or with transformers",
                )
        return left


def _block(name: str) -> str:
    """Name the block that a layer is in, or the layer itself outside of every block."""
    match = BLOCK.fullmatch(name)
    return match[1] if match else name
