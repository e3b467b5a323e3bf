"""Load and run one linear layer of vLLM's model from packed codes; imports vLLM.

vLLM's model reads the checkpoint and hands each tensor to the layer it belongs to, in the model's
own order. Here the tensors of a layer are collected, put together by the checkpoint's reader, cut
for this worker, and given to a kernel. Nothing is filled in: a tensor that does not arrive is an
error.
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

from gptq_loader_extensions.vllm.error_messages import in_words
from gptq_loader_extensions.vllm.layers.operator import multiply_layer
from gptq_loader_extensions.vllm.layers.shards import (
    Cut,
    Piece,
    cut_pieces,
    describe,
    even_cut,
    join,
    take,
)
from gptq_loader_extensions.vllm.layers.tensor_collector import PARTS, Arrivals, empty_parameter
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
        self._pieces: dict[tuple[int, ...], Piece] = {}
        self._arrivals = Arrivals(context.checkpoint)
        self._taken: dict[str, PackedLinear] = {}
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
        """Prepare for the layer's tensors: parameters that hold nothing, and hand on what comes."""
        del params_dtype, extra_weight_attrs
        checkpoint = self._context.checkpoint
        layers = [checkpoint.layers[name] for name in self._names]
        with in_words():
            self._backend = self._context.backend()
            cut = _cut(
                layer,
                widths=output_partition_sizes,
                rows=input_size_per_partition,
                inputs=input_size,
                outputs=output_size,
            )
            pieces = cut_pieces(layers, cut, path=checkpoint.path)
        self._pieces = {it.parts: it for it in pieces}
        self._outputs = sum(output_partition_sizes)
        self._padding = self._outputs - sum(stop - start for start, stop in cut.columns)
        context = get_current_vllm_config().compilation_config.static_forward_context
        if self._key in context:
            raise ValueError(f"two layers of this model are called {self._prefix}")
        context[self._key] = self
        for part in PARTS:
            if self._arrivals.expects(part, self._names):
                loader = partial(self._arrive, layer, part)
                parameter = empty_parameter(part, layers[0].scales_dtype, loader)
                layer.register_parameter(part, parameter)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Give what arrived to the kernels, and drop it."""
        with in_words():
            self._context.check_claimed()
            self._arrivals.check_complete(self._names)
            self._check_biases(layer)
            device = find_device(str(next(layer.parameters(recurse=False)).device))
            taken = join([self._taken[name] for name in self._names])
            self._modules = [self._prepare(it, device) for it in taken]
        self._taken.clear()
        layer.prepared = torch.nn.ModuleList(self._modules)
        release_freed()

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply: x [..., in_features] -> [..., out_features]."""
        del layer
        if torch.compiler.is_compiling():
            y: torch.Tensor = multiply_layer(x, self._key, self._outputs)
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

    def _arrive(
        self,
        layer: torch.nn.Module,
        part: str,
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        loaded_shard_id: str | int | tuple[int, ...] | None = None,
    ) -> None:
        """Take a tensor that vLLM's model hands over; take the layer where it was the last."""
        del param
        with in_words():
            piece = self._piece(loaded_shard_id)
            packed = self._arrivals.add(piece.layer.name, part, loaded_weight)
            if packed is None:
                return
            if layer.bias is not None or (isinstance(layer, RowParallelLinear) and layer.tp_rank):
                packed = replace(packed, bias=None)  # vLLM adds it, or the first worker does
            self._taken[piece.layer.name] = take(packed, piece)

    def _piece(self, shard: str | int | tuple[int, ...] | None) -> Piece:
        """Find the layer of the checkpoint that vLLM's model means by a shard's id."""
        if shard is None:
            parts = tuple(sorted(it for known in self._pieces for it in known))
        elif isinstance(shard, tuple):
            parts = shard
        else:
            parts = (QKV[shard] if isinstance(shard, str) else shard,)
        if parts not in self._pieces:
            raise self._arrivals.mismatch(
                f"{self._names[0]}.qweight", f"is handed over as part {shard} of {self._prefix}"
            )
        return self._pieces[parts]

    def _check_biases(self, layer: torch.nn.Module) -> None:
        """Check that a bias that vLLM adds was there to be loaded."""
        for name in self._names:
            if layer.bias is not None and f"{name}.bias" not in self._context.checkpoint.headers:
                raise self._arrivals.mismatch(f"{name}.bias", "is missing")

    def _prepare(self, packed: PackedLinear, device: Device) -> torch.nn.Module:
        like = self._context.checkpoint.layers[self._names[0]]
        spec = describe(packed, like, name=self._prefix)
        choice = choose(spec, device, self._context.kernels, only=self._backend)
        self._context.log(choice)
        return choice.kernel.prepare(spec, packed, device).to(device.torch_name).eval()


def _cut(
    layer: Any,  # noqa: ANN401 - one of vLLM's linear layers
    *,
    widths: Sequence[int],
    rows: int,
    inputs: int,
    outputs: int,
) -> Cut:
    """Find what this worker has of one of vLLM's layers, as vLLM cuts plain weights."""
    rank, workers = layer.tp_rank, layer.tp_size
    mine: Span = (0, inputs)
    if isinstance(layer, RowParallelLinear):
        mine = (rank * rows, (rank + 1) * rows)
    if isinstance(layer, ParallelLMHead):
        ids = layer.shard_indices
        sizes: tuple[int, ...] = (layer.org_vocab_size,)
        columns: tuple[Span, ...] = ((ids.org_vocab_start_index, ids.org_vocab_end_index),)
    elif isinstance(layer, QKVParallelLinear):
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
        lengths = (layer.head_size, layer.head_size, layer.v_head_size)
        sizes = tuple(count * length for count, length in zip(heads, lengths, strict=True))
        shared = rank // layer.num_kv_head_replicas
        ranks = (rank, shared, shared)
        columns = tuple((it * w, (it + 1) * w) for it, w in zip(ranks, widths, strict=True))
    else:
        sizes, columns = even_cut(widths, columns=outputs, rank=rank, workers=workers)
    return Cut(inputs, sizes, columns, mine, workers)
