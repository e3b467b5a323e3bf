"""Load the quantised experts of one of vLLM's mixtures; imports vLLM.

vLLM runs all experts of a layer in one kernel, over one plain matrix, so each expert is dequantised
into its place once, and the mixture then runs like one that is not quantised.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)

from gptq_loader_extensions.vllm.error_messages import as_value_error
from gptq_loader_extensions.vllm.layers.shards import Partition, slice_layers, slice_packed
from gptq_loader_extensions.vllm.layers.tensor_collector import (
    PARTS,
    TensorCollector,
    empty_parameter,
)
from gptq_loader_plugin.system.heap import release_freed

if TYPE_CHECKING:
    import torch

    from gptq_loader_extensions.vllm.layers.context import LoadContext
    from gptq_loader_plugin.kernel import PackedLinear

__all__ = ["GPTQLoaderExpertsMethod", "expert_names"]

PARAMETERS = ("w13", "w2")  # vLLM's: gate and up in one, and down


def expert_names(layer: Any, prefix: str) -> dict[tuple[int, str], str]:  # noqa: ANN401 - vLLM's
    """Return the model's names of every expert's projections, by expert and vLLM's shard id."""
    parent = prefix.removesuffix(".routed_experts")
    projections = {
        "w1": layer.ckpt_gate_proj_name,
        "w2": layer.ckpt_down_proj_name,
        "w3": layer.ckpt_up_proj_name,
    }
    return {
        (expert, shard): f"{parent}.{expert}.{name}"
        for expert in range(layer.global_num_experts)
        for shard, name in projections.items()
        if name is not None
    }


class GPTQLoaderExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc] # vLLM is not there when checked
    """Load and run the experts of one layer, dequantised.

    Args:
        context: the checkpoint.
        names: the checkpoint's layers, by expert and vLLM's id of the projection.
        moe: vLLM's config of the mixture.
    """

    supports_eplb = False  # experts have one place

    def __init__(
        self,
        context: LoadContext,
        names: dict[tuple[int, str], str],
        moe: Any,  # noqa: ANN401 - vLLM's FusedMoEConfig
    ) -> None:
        super().__init__(moe)
        self._context = context
        self._names = names
        self._collector = TensorCollector(context.checkpoint)

    def create_weights(
        self,
        layer: Any,  # noqa: ANN401 - vLLM's RoutedExperts
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Make the plain weights, and empty parameters that pass on what is loaded into them."""
        super().create_weights(
            layer,
            num_experts,
            hidden_size,
            intermediate_size_per_partition,
            params_dtype,
            **extra_weight_attrs,
        )
        layer.w13_weight.data.zero_()  # for the padding
        layer.w2_weight.data.zero_()
        layers = [self._context.checkpoint.layers[name] for name in self._names.values()]
        for part in PARTS:
            if self._collector.expects(part, self._names.values()):
                loader = partial(self._load_tensor, layer, part)
                for name in PARAMETERS:
                    parameter = empty_parameter(part, layers[0].scales_dtype, loader)
                    layer.register_parameter(f"{name}_{part}", parameter)

    def process_weights_after_loading(self, layer: Any) -> None:  # noqa: ANN401 - vLLM's
        """Check that every expert of this worker is complete, and finish as for plain weights."""
        local_names = [
            name
            for (expert, _), name in self._names.items()
            if layer._map_global_expert_id_to_local_expert_id(expert) != -1  # noqa: SLF001
        ]
        with as_value_error():
            self._context.check_claimed()
            self._collector.check_complete(local_names)
        self._context.log_experts(layer.layer_name, len(local_names))
        super().process_weights_after_loading(layer)
        release_freed()

    def _load_tensor(
        self,
        layer: Any,  # noqa: ANN401 - vLLM's RoutedExperts
        part: str,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,  # noqa: FBT001, FBT002 - vLLM's signature
    ) -> bool | None:
        """Collect a tensor that vLLM's model loads; dequantise the layer once it is complete."""
        del param, weight_name
        local = layer._map_global_expert_id_to_local_expert_id(expert_id)  # noqa: SLF001
        if local == -1:
            return False if return_success else None
        name = self._names[expert_id, shard_id]
        with as_value_error():
            packed = self._collector.add(name, part, loaded_weight)
            if packed is not None:
                self._place(layer, local, shard_id, name, packed)
        return True if return_success else None

    def _place(
        self,
        layer: Any,  # noqa: ANN401 - vLLM's RoutedExperts
        expert: int,
        shard: str,
        name: str,
        packed: PackedLinear,
    ) -> None:
        """Dequantise this worker's part of a projection into its place."""
        if packed.bias is not None:
            raise self._collector.mismatch(f"{name}.bias", "is not zero; vLLM's experts have none")
        spec = self._context.checkpoint.layers[name]
        width, rank = self.moe.intermediate_size_per_partition_unpadded, self.moe.tp_rank
        span = (rank * width, (rank + 1) * width)
        if shard == "w2":
            columns, rows = (0, spec.out_features), span
        else:
            columns, rows = span, (0, spec.in_features)
        partition = Partition(
            spec.in_features, (spec.out_features,), (columns,), rows, self.moe.tp_size
        )
        (layer_slice,) = slice_layers([spec], partition, path=self._context.checkpoint.path)
        weight = slice_packed(packed, layer_slice).dequantize()  # [N, K]
        target = (layer.w2_weight if shard == "w2" else layer.w13_weight).data[expert]
        first = self.moe.intermediate_size_per_partition if shard == "w3" else 0
        target[first : first + weight.shape[0], : weight.shape[1]].copy_(weight)
