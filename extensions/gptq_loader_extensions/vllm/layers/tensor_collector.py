"""Collect the tensors of layers as vLLM's model loads them, until a layer is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.errors import TensorMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from gptq_loader_plugin.checkpoint.reader import GPTQCheckpoint
    from gptq_loader_plugin.kernel import PackedLinear

__all__ = ["PARTS", "TensorCollector", "empty_parameter"]

PARTS = ("qweight", "qzeros", "scales", "g_idx")


class TensorCollector:
    """The tensors of some layers of a checkpoint that have arrived.

    Args:
        checkpoint: the checkpoint, whose headers list what must arrive.
    """

    def __init__(self, checkpoint: GPTQCheckpoint) -> None:
        self._checkpoint = checkpoint
        self._parts: dict[str, dict[str, torch.Tensor]] = {}
        self._complete: set[str] = set()

    def expects(self, part: str, names: Iterable[str]) -> bool:
        """Return whether any of these layers has this part in the checkpoint."""
        return any(f"{name}.{part}" in self._checkpoint.headers for name in names)

    def add(self, name: str, part: str, tensor: torch.Tensor) -> PackedLinear | None:
        """Add a tensor; return the layer once it is complete.

        Raises:
            TensorMismatch: it arrived before, or is not the one in the checkpoint.
        """
        arrived = self._parts.setdefault(name, {})
        info = self._checkpoint.headers.get(f"{name}.{part}")
        if part in arrived or name in self._complete:
            raise self.mismatch(f"{name}.{part}", "arrived twice")
        if info is None or tuple(info.shape) != tuple(tensor.shape):
            raise self.mismatch(
                f"{name}.{part}",
                f"arrived as {list(tensor.shape)}, which is not its shape in the checkpoint",
            )
        # a copy: some of vLLM's readers reuse the memory
        arrived[part] = tensor.to("cpu", copy=True).contiguous()
        if self._missing(name):
            return None
        self._complete.add(name)
        return self._checkpoint.assemble(name, self._parts.pop(name))

    def check_complete(self, names: Iterable[str]) -> None:
        """Check that these layers are complete.

        Raises:
            TensorMismatch: a tensor did not arrive.
        """
        for name in names:
            if name not in self._complete:
                raise self.mismatch(
                    self._missing(name)[0], "did not arrive: vLLM's model did not load it"
                )

    def mismatch(self, tensor: str, problem: str) -> TensorMismatch:
        """Return the error of a tensor that is not loaded as it should be."""
        return TensorMismatch(
            f"{tensor} {problem}",
            path=self._checkpoint.path,
            tensor=tensor,
            hint="load it with gptq-loader, or with transformers: this model of vLLM loads GPTQ "
            "tensors in an unknown way",
        )

    def _missing(self, name: str) -> list[str]:
        headers, arrived = self._checkpoint.headers, self._parts.get(name, {})
        stored = [part for part in PARTS if f"{name}.{part}" in headers]
        return [f"{name}.{part}" for part in stored if part not in arrived]


def empty_parameter(part: str, scales_dtype: str, loader: Callable[..., Any]) -> torch.nn.Parameter:
    """Return an empty parameter that passes what is loaded into it to `loader`."""
    dtype: torch.dtype = getattr(torch, scales_dtype) if part == "scales" else torch.int32
    empty = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
    attributes: Any = empty
    attributes.weight_loader = loader
    if part != "g_idx":
        attributes.output_dim = 1  # some models reorder columns by it
    return empty
