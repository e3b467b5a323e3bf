"""Load and run one linear layer of vLLM's model from packed codes; imports vLLM.

vLLM's model reads the checkpoint and passes each tensor to the layer it belongs to, in the model's
own order. Here the tensors of a layer are collected, assembled by the checkpoint's reader, sliced
for this worker, and passed to a kernel. No tensor is made up: one that does not arrive is an error.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from gptq_loader_extensions.vllm.error_messages import as_value_error
from gptq_loader_extensions.vllm.layers.operator import layer_argument, multiply_layer
from gptq_loader_extensions.vllm.layers.shards import (
    LayerSlice,
    Partition,
    describe,
    even_partition,
    join,
    slice_layers,
    slice_packed,
)
from gptq_loader_extensions.vllm.layers.tensor_collector import (
    PARTS,
    TensorCollector,
    empty_parameter,
)
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.planning.choose import choose
from gptq_loader_plugin.system.heap import release_freed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_extensions.vllm.layers.context import LoadContext
    from gptq_loader_extensions.vllm.layers.shards import Span
    from gptq_loader_plugin.kernel import Device, PackedLinear

__all__ = ["GPTQLoaderLinearMethod"]

QKV = {"q": 0, "k": 1, "v": 2}


class GPTQLoaderLinearMethod(LinearMethodBase):  # type: ignore[misc] # vLLM is not there when checked
    """Load and run one layer of the model, made of one or several layers of the checkpoint.

    Args:
        context: the checkpoint and the kernels.
        prefix: the layer's name in vLLM's model.
        names: the names of the checkpoint's layers that it is made of, in order.
    """

    def __init__(self, context: LoadContext, prefix: str, names: Sequence[str]) -> None:
        self._context = context
        self._prefix = prefix
        self._names = names
        self._key = f"{prefix}.gptq_loader"
        self._argument = layer_argument(self._key)
        self._slices: dict[tuple[int, ...], LayerSlice] = {}
        self._collector = TensorCollector(context.checkpoint)
        self._packed: dict[str, PackedLinear] = {}
        self._modules: list[torch.nn.Module] = []
        self._outputs = 0  # columns of y, padding included
        self._padding = 0
        self._backend: str | None = None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: object,
    ) -> None:
        """Make empty parameters for the layer's tensors, which pass on what is loaded into them."""
        del params_dtype, extra_weight_attrs
        checkpoint = self._context.checkpoint
        layers = [checkpoint.layers[name] for name in self._names]
        with as_value_error():
            self._backend = self._context.backend()
            partition = _partition(
                layer,
                widths=output_partition_sizes,
                rows=input_size_per_partition,
                inputs=input_size,
                outputs=output_size,
            )
            slices = slice_layers(layers, partition, path=checkpoint.path)
        self._slices = {layer_slice.parts: layer_slice for layer_slice in slices}
        self._outputs = sum(output_partition_sizes)
        self._padding = self._outputs - sum(stop - start for start, stop in partition.columns)
        context = get_current_vllm_config().compilation_config.static_forward_context
        if self._key in context:
            raise ValueError(f"two layers of this model are called {self._prefix}")
        context[self._key] = self
        for part in PARTS:
            if self._collector.expects(part, self._names):
                loader = partial(self._load_tensor, layer, part)
                parameter = empty_parameter(part, layers[0].scales_dtype, loader)
                layer.register_parameter(part, parameter)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Have kernels prepare the collected layers, and release the packed ones."""
        with as_value_error():
            self._context.check_claimed()
            self._collector.check_complete(self._names)
            self._check_biases(layer)
            device = find_device(str(next(layer.parameters(recurse=False)).device))
            joined = join([self._packed[name] for name in self._names])
            self._modules = [self._prepare(packed, device) for packed in joined]
        self._packed.clear()
        layer.prepared = torch.nn.ModuleList(self._modules)
        release_freed()

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply: x [..., in_features] -> [..., out_features]."""
        del layer
        if torch.compiler.is_compiling():
            y: torch.Tensor = multiply_layer(x, self._argument, self._outputs)
        else:
            y = self.multiply(x)
        return y if bias is None else y + bias

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply with the prepared kernels, side by side where there are several."""
        ys = [module(x) for module in self._modules]
        y: torch.Tensor = ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)
        return torch.nn.functional.pad(y, (0, self._padding)) if self._padding else y

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Leave a quantised output head as it is: it has weights of its own."""
        del embed_tokens
        return layer

    def _load_tensor(
        self,
        layer: torch.nn.Module,
        part: str,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        loaded_shard_id: str | int | tuple[int, ...] | None = None,
    ) -> None:
        """Collect a tensor that vLLM's model loads; slice the layer once it is complete."""
        del param
        with as_value_error():
            layer_slice = self._find_slice(loaded_shard_id)
            name = layer_slice.layer.name
            packed = self._collector.add(name, part, loaded_weight)
            if packed is None:
                return
            if layer.bias is not None or (isinstance(layer, RowParallelLinear) and layer.tp_rank):
                packed = replace(packed, bias=None)  # vLLM adds it, or the first worker does
            self._packed[name] = slice_packed(packed, layer_slice)

    def _find_slice(self, shard: str | int | tuple[int, ...] | None) -> LayerSlice:
        """Return the slice of the checkpoint's layer that vLLM's model means by a shard's id."""
        if shard is None:
            parts = tuple(sorted(part for parts in self._slices for part in parts))
        elif isinstance(shard, tuple):
            parts = shard
        else:
            parts = (QKV[shard] if isinstance(shard, str) else shard,)
        if parts not in self._slices:
            raise self._collector.mismatch(
                f"{self._names[0]}.qweight", f"was loaded as part {shard} of {self._prefix}"
            )
        return self._slices[parts]

    def _check_biases(self, layer: torch.nn.Module) -> None:
        """Check that the checkpoint has the bias that vLLM adds."""
        for name in self._names:
            if layer.bias is not None and f"{name}.bias" not in self._context.checkpoint.headers:
                raise self._collector.mismatch(f"{name}.bias", "is missing")

    def _prepare(self, packed: PackedLinear, device: Device) -> torch.nn.Module:
        like = self._context.checkpoint.layers[self._names[0]]
        spec = describe(packed, like, name=self._prefix)
        choice = choose(spec, device, self._context.kernels, only=self._backend)
        self._context.log(choice)
        return choice.kernel.prepare(spec, packed, device).to(device.torch_name).eval()


def _partition(
    layer: Any,  # noqa: ANN401 - one of vLLM's linear layers
    *,
    widths: Sequence[int],
    rows: int,
    inputs: int,
    outputs: int,
) -> Partition:
    """Return this worker's part of one of vLLM's layers, as vLLM partitions plain weights."""
    rank, workers = layer.tp_rank, layer.tp_size
    row_span: Span = (0, inputs)
    if isinstance(layer, RowParallelLinear):
        row_span = (rank * rows, (rank + 1) * rows)
    if isinstance(layer, ParallelLMHead):
        ids = layer.shard_indices
        sizes: tuple[int, ...] = (layer.org_vocab_size,)
        columns: tuple[Span, ...] = ((ids.org_vocab_start_index, ids.org_vocab_end_index),)
    elif isinstance(layer, QKVParallelLinear):
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
        lengths = (layer.head_size, layer.head_size, layer.v_head_size)
        sizes = tuple(count * length for count, length in zip(heads, lengths, strict=True))
        kv_rank = rank // layer.num_kv_head_replicas
        ranks = zip((rank, kv_rank, kv_rank), widths, strict=True)
        columns = tuple((part * width, (part + 1) * width) for part, width in ranks)
    else:
        sizes, columns = even_partition(widths, columns=outputs, rank=rank, workers=workers)
    return Partition(inputs, sizes, columns, row_span, workers)
