"""Decode one token of each sequence with fewer kernels than transformers' layers launch.

The layers of Llama and its relatives are a norm, a product of q, k and v, a rotation, attention,
a product, a sum and a norm, a product of gate and up, an activation, a product, and a sum. Here
each of these is one operator: the products are joined, each sum goes with the norm that follows
it, a rotation writes the cache. Which positions each layer sees, by which table it rotates and what
else it tells its attention is what it did in a step of transformers' own forward, which was
watched; its class and modules say the rest. A decoder that is not of `FAMILIES`, or was changed,
goes on with transformers' layers.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gptq_loader_plugin.generation.final_logits import final_logits
from gptq_loader_plugin.kernel import FusedOperators, Joinable
from gptq_loader_plugin.model.experts import watch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from gptq_loader_plugin.engine.attention import Step

__all__ = ["FusedDecoder", "NotFused", "Observed", "observing"]

# How the norms of a decoder round, by the name its classes begin with.
FAMILIES = {
    "Gemma": "gemma", "Gemma2": "gemma", "Gemma3": "gemma", "Llama": "llama", "Mistral": "llama",
    "Mixtral": "llama", "Phi3": "llama", "Qwen2": "llama", "Qwen2Moe": "llama", "Qwen3": "llama",
    "Qwen3Moe": "llama",
}  # fmt: skip
ACTIVATIONS = {
    "SiLUActivation": "silu", "SiLU": "silu",
    "GELUTanh": "gelu_pytorch_tanh", "PytorchGELUTanh": "gelu_pytorch_tanh",
}  # fmt: skip


class NotFused(Exception):
    """A decoder does something that the operators do not."""


@dataclass(slots=True)
class Observed:
    """What the layers of a decoder were seen to do in one step.

    Attributes:
        attention: of each layer, how it attends, as `Step.attend` takes it.
        tables: each rotary table: the module, what it took beside x and positions, and its cos.
        rotations: of each attention module, which of the tables it was handed.
        active: whether the layers are watched now.
    """

    attention: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    tables: list[tuple[nn.Module, tuple[Any, ...], torch.Tensor]] = field(default_factory=list)
    rotations: dict[int, int] = field(default_factory=dict)
    active: bool = False


@contextmanager
def observing(decoder: nn.Module, observed: Observed) -> Iterator[None]:
    """See which rotary table each attention module of a decoder is handed."""

    def made(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ANN401 - a hook
        beside = (
            *args[2:],
            *(it for name, it in kwargs.items() if name not in {"x", "position_ids"}),
        )
        if isinstance(output, tuple):
            observed.tables.append((module, beside, output[0]))

    def handed(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args
        pair = kwargs.get("position_embeddings")
        for at, (_, _, cos) in enumerate(observed.tables):
            if isinstance(pair, tuple) and pair[0] is cos:
                observed.rotations[id(module)] = at

    hooks = []
    for module in decoder.modules():
        name = type(module).__name__
        if name.endswith("RotaryEmbedding"):
            hooks.append(module.register_forward_hook(made, with_kwargs=True))
        elif name.endswith("Attention"):
            hooks.append(module.register_forward_pre_hook(handed, with_kwargs=True))
    observed.active = True
    try:
        yield
    finally:
        observed.active = False
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True, slots=True)
class _Attention:
    index: int  # of the layer's cache
    norm: Any  # before it
    products: _Products
    output: nn.Module
    heads: tuple[int, int]  # of queries, and of keys and values
    table: int
    query_norm: Any
    key_norm: Any
    how: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Mlp:
    norm: Any  # before it, with the sum before
    summand_norm: Any  # of what is added to that sum: the output of attention
    whole: nn.Module | None  # a mixture of experts, or what else is called as it is
    products: _Products | None
    activation: str
    down: nn.Module | None
    output_norm: Any  # of its output, before it is added


@dataclass(frozen=True, slots=True)
class _Products:
    """Modules that read the same x, joined where their kernel can."""

    parts: tuple[nn.Module, ...]
    joined: nn.Module | None

    @classmethod
    def of(cls, *parts: nn.Module) -> _Products:
        joined = parts[0] if len(parts) == 1 else _join(parts)
        return cls(parts, joined)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply: [tokens, in_features] -> [tokens, outputs of all]."""
        y: torch.Tensor
        if self.joined is not None:
            y = self.joined(x)
        else:
            y = torch.cat([part(x) for part in self.parts], dim=-1)
        return y


class FusedDecoder:
    """A decoder's step by fused operators.

    Args:
        model: a causal language model.
        operators: what to compute by.
        observed: what its layers do.

    Raises:
        NotFused: it is not one of `FAMILIES`, or its layers do something else.
    """

    def __init__(self, model: Any, operators: FusedOperators, observed: Observed) -> None:  # noqa: ANN401
        decoder = model.get_decoder()
        self._family, self._style = _family_of(decoder)
        self._operators, self._observed = operators, observed
        self._embed, self._norm = decoder.embed_tokens, decoder.norm
        self._model = model
        self._tables = [(module, beside) for module, beside, _ in observed.tables]
        self._layers = [self._describe(layer) for layer in decoder.layers]
        self._following = [*(layer[0].norm for layer in self._layers[1:]), self._norm]
        self._eps = _epsilon(self._norm)
        norms = [it for layer in self._layers for part in layer for it in _norms(part)]
        if any(_epsilon(it) != self._eps for it in norms):
            raise NotFused("its norms have several epsilons")
        self._watch = watch(
            decoder,
            [*decoder.layers.modules(), decoder.norm, self._embed, model.get_output_embeddings()],
        )

    def unchanged(self) -> bool:
        """Return whether nothing in the model was replaced since, and nobody watches it."""
        return self._watch.unchanged()

    def __call__(self, tokens: torch.Tensor, positions: torch.Tensor, step: Step) -> torch.Tensor:
        """Read one token of each sequence: int64 [sequences] -> logits [sequences, vocabulary]."""
        operators, eps, style = self._operators, self._eps, self._style
        residual = self._embed(tokens[None])[0]
        tables = [
            _half(make(residual[None], positions[None], *beside)) for make, beside in self._tables
        ]
        x = operators.rms_norm(residual, self._layers[0][0].norm.weight, eps, style=style)
        for (attention, mlp), following in zip(self._layers, self._following, strict=True):
            x = self._attend(attention, x, tables, step)
            x, residual = operators.add_rms_norm(
                x, residual, mlp.norm.weight, eps,
                style=style, post_weight=_weight(mlp.summand_norm),
            )  # fmt: skip
            x = self._run_mlp(mlp, x)
            x, residual = operators.add_rms_norm(
                x, residual, following.weight, eps,
                style=style, post_weight=_weight(mlp.output_norm),
            )  # fmt: skip
        return final_logits(self._model, x)

    def _attend(
        self,
        layer: _Attention,
        x: torch.Tensor,
        tables: Sequence[tuple[torch.Tensor, torch.Tensor]],
        step: Step,
    ) -> torch.Tensor:
        heads, kv_heads = layer.heads
        joined = layer.products(x)
        joined = joined.view(len(x), heads + 2 * kv_heads, -1)
        query, keys, values = joined.split((heads, kv_heads, kv_heads), dim=1)
        cache = step.caches[layer.index]
        query = self._operators.rotary_and_cache(
            query, keys, values, *tables[layer.table], cache.keys, cache.values, step.slots,
            query_weight=_weight(layer.query_norm), key_weight=_weight(layer.key_norm),
            eps=self._eps, style=self._style,
            key_scales=cache.key_scales, value_scales=cache.value_scales,
        )  # fmt: skip
        y: torch.Tensor = layer.output(step.attend(query, layer.index, **layer.how).flatten(1))
        return y

    def _run_mlp(self, layer: _Mlp, x: torch.Tensor) -> torch.Tensor:
        y: Any
        if layer.products is not None and layer.down is not None:
            y = layer.down(
                self._operators.activation_and_mul(layer.products(x), activation=layer.activation)
            )
        else:
            assert layer.whole is not None
            y = layer.whole(x[None])
            y = (y[0] if isinstance(y, tuple) else y)[0]  # beside the router's logits, or alone
        return y  # type: ignore[no-any-return]

    def _describe(self, layer: Any) -> tuple[_Attention, _Mlp]:  # noqa: ANN401
        attention = layer.self_attn
        for part, name in ((layer, "DecoderLayer"), (attention, "Attention")):
            if type(part).__name__ != self._family + name or not _is_transformers(part):
                raise NotFused(f"it has a {type(part).__name__}")
        index = attention.layer_idx
        if index not in self._observed.attention or id(attention) not in self._observed.rotations:
            raise NotFused("its rotation is not one that all layers share")
        if hasattr(attention, "qkv_proj"):
            products = _Products.of(attention.qkv_proj)
        else:
            products = _Products.of(attention.q_proj, attention.k_proj, attention.v_proj)
        config, size = attention.config, attention.head_dim
        described = _Attention(
            index=index,
            norm=self._checked(layer.input_layernorm),
            products=products,
            output=attention.o_proj,
            heads=(config.num_attention_heads, config.num_key_value_heads),
            table=self._observed.rotations[id(attention)],
            query_norm=self._checked(getattr(attention, "q_norm", None), size),
            key_norm=self._checked(getattr(attention, "k_norm", None), size),
            how=self._observed.attention[index],
        )
        return described, self._describe_mlp(layer)

    def _describe_mlp(self, layer: Any) -> _Mlp:  # noqa: ANN401
        between = self._checked(layer.post_attention_layernorm)
        before = self._checked(getattr(layer, "pre_feedforward_layernorm", None))
        after = self._checked(getattr(layer, "post_feedforward_layernorm", None))
        if (before is None) != (after is None):
            raise NotFused("it has three norms a layer")
        mlp = getattr(layer, "mlp", None) or getattr(layer, "block_sparse_moe", None)
        if mlp is None or not _is_transformers(mlp):
            raise NotFused(f"it has a {type(mlp).__name__}")
        products = None
        activation = next(
            (
                type(getattr(mlp, name)).__name__
                for name in ("act_fn", "activation_fn")
                if hasattr(mlp, name)
            ),
            "",
        )
        if type(mlp).__name__.endswith("MLP") and activation in ACTIVATIONS:
            products = (
                _Products.of(mlp.gate_up_proj)
                if hasattr(mlp, "gate_up_proj")
                else _Products.of(mlp.gate_proj, mlp.up_proj)
            )
        return _Mlp(
            norm=between if before is None else before,
            summand_norm=None if before is None else between,
            whole=mlp if products is None else None,
            products=products,
            activation=ACTIVATIONS.get(activation, ""),
            down=None if products is None else mlp.down_proj,
            output_norm=after,
        )

    def _checked(self, norm: Any, size: int | None = None) -> Any:  # noqa: ANN401
        """Return a norm that is transformers' own, or None where there is none."""
        if norm is None:
            return None
        if type(norm).__name__ != self._family + "RMSNorm" or not _is_transformers(norm):
            raise NotFused(f"it has a {type(norm).__name__}")
        if size is not None and norm.weight.shape != (size,):
            raise NotFused("it normalises all heads at once")
        return norm


def _family_of(decoder: Any) -> tuple[str, str]:  # noqa: ANN401
    name = type(decoder).__name__.removesuffix("Model").removesuffix("Text")
    if name not in FAMILIES or not _is_transformers(decoder):
        raise NotFused(f"it is a {type(decoder).__name__}")
    return name, FAMILIES[name]


def _is_transformers(module: Any) -> bool:  # noqa: ANN401
    return type(module).__module__.startswith("transformers.models.")


def _epsilon(norm: Any) -> float:  # noqa: ANN401
    return float(norm.eps if hasattr(norm, "eps") else norm.variance_epsilon)


def _norms(part: _Attention | _Mlp) -> list[Any]:
    if isinstance(part, _Attention):
        every = (part.norm, part.query_norm, part.key_norm)
    else:
        every = (part.norm, part.summand_norm, part.output_norm)
    return [it for it in every if it is not None]


def _weight(norm: Any) -> torch.Tensor | None:  # noqa: ANN401
    return None if norm is None else norm.weight


def _half(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one of the two equal halves of a table [1, tokens, 2 * R]."""
    cos, sin = (it[0, :, : it.shape[-1] // 2] for it in pair)
    return cos, sin


def _join(parts: Sequence[nn.Module]) -> nn.Module | None:
    first, *others = parts
    if all(type(it) is nn.Linear for it in parts):
        return _join_linears([it for it in parts if isinstance(it, nn.Linear)])
    return first.join(others) if isinstance(first, Joinable) else None


def _join_linears(parts: Sequence[nn.Linear]) -> nn.Linear | None:
    """Join layers that are not packed; their weights become parts of the joined one."""
    biases: list[torch.Tensor] = [it.bias for it in parts if it.bias is not None]
    kinds = {(it.weight.dtype, it.weight.device, it.in_features) for it in parts}
    if (
        len(biases) not in {0, len(parts)}
        or len(kinds) > 1
        or any(it.weight.is_meta for it in parts)
    ):
        return None
    with torch.no_grad():
        joined = nn.Linear(parts[0].in_features, 0, bias=bool(biases), device="meta")
        joined.out_features = sum(it.out_features for it in parts)
        joined.weight = nn.Parameter(torch.cat([it.weight for it in parts]), requires_grad=False)
        if biases:
            joined.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        ends = list(itertools.accumulate(it.out_features for it in parts))
        for part, end in zip(parts, ends, strict=True):
            own = slice(end - part.out_features, end)
            part.weight.data = joined.weight[own]
            if biases:
                part.bias.data = joined.bias[own]
    return joined
