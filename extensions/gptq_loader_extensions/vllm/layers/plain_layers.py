"""Dequantise the layers that vLLM's model keeps plain, on their way to it; imports vLLM.

Some of vLLM's models have layers that no quantization method sees, such as Mixtral's router, which
checkpoints may hold quantised all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from vllm.model_executor.models.utils import WeightsMapper

from gptq_loader_extensions.vllm.error_messages import as_value_error
from gptq_loader_extensions.vllm.layers.tensor_collector import PARTS, TensorCollector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from gptq_loader_extensions.vllm.layers.context import LoadContext

__all__ = ["PlainLayers"]


@dataclass
class PlainLayers(WeightsMapper):  # type: ignore[misc] # vLLM is not there when checked
    """Pass a checkpoint's tensors on to vLLM's model, as mappers do, with plain layers dequantised.

    vLLM merges it into the mapper of the model. It renames nothing itself.

    Attributes:
        context: the checkpoint.
    """

    context: LoadContext | None = None

    def __or__(self, other: Any) -> PlainLayers:  # noqa: ANN401 - vLLM's WeightsMapper
        """Merge as vLLM's mappers do, and go on dequantising."""
        return self._following(super().__or__(other))

    def __ror__(self, other: Any) -> PlainLayers:  # noqa: ANN401 - vLLM's WeightsMapper
        """Merge into a mapper of vLLM's: Python asks the subclass first."""
        return self._following(other)

    def apply(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterable[tuple[str, torch.Tensor]]:
        """Rename as the model does, once plain layers are dequantised."""
        passed: Iterable[tuple[str, torch.Tensor]] = super().apply(self._dequantize(weights))
        return passed

    def _following(self, mapper: Any) -> PlainLayers:  # noqa: ANN401 - vLLM's WeightsMapper
        names = {it.name: getattr(mapper, it.name) for it in fields(WeightsMapper)}
        return PlainLayers(**names, context=self.context)

    def _dequantize(
        self, weights: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        assert self.context is not None
        plain = set(self.context.names.unclaimed_in_blocks())
        collector = TensorCollector(self.context.checkpoint)
        for tensor_name, tensor in weights:
            name, _, part = tensor_name.rpartition(".")
            if part not in PARTS or name not in plain:
                yield tensor_name, tensor
                continue
            with as_value_error():
                packed = collector.add(name, part, tensor)
                if packed is None:
                    continue
                if packed.bias is not None:
                    raise collector.mismatch(f"{name}.bias", "is not zero; vLLM's layer has none")
            self.context.log_plain(name)
            self.context.names.claim_plain(name)
            yield f"{name}.weight", packed.dequantize()
