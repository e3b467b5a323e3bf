"""transformers' attention over paged keys and values.

transformers' classes hand queries, keys and values of every layer to the attention function that
the config names. While a step of the engine runs, that is `_forward` here: it writes new keys and
values into the blocks of their sequences, and attends to all of each sequence's. Tokens of all
sequences lie in one row, so a class sees a batch of one. In other threads, and between steps, the
same name stands for what the model used before.

Which positions a query sees, a class says by the mask it asks for. In a step it gets a `Window` in
place of one.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gptq_loader_plugin.kernel import PagedAttention

__all__ = ["KVCache", "NotPaged", "Step", "StepCache", "Window", "attention_of"]

NAME = "gptq_paged"
# What classes hand to attention that changes nothing in what it computes here.
IGNORED = frozenset((
    "attention_mask", "cache_position", "dropout", "is_causal", "layer_idx", "logits_to_keep",
    "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings",
    "position_ids", "return_dict", "sliding_window", "use_cache",
))  # fmt: skip

_running = threading.local()


class NotPaged(Exception):
    """A model does something with its keys and values that the engine does not do."""


@dataclass(frozen=True, slots=True)
class Window:
    """Which positions a query sees: all before it and its own, or the last `size` of them."""

    size: int | None = None


@dataclass(slots=True)
class KVCache:
    """The keys and values of one layer, in blocks.

    Attributes:
        keys: [blocks, block_size, kv_heads, head_dim].
        values: [blocks, block_size, kv_heads, value_dim].
        key_scales: what each head of a position is multiplied by, float16
            [blocks, block_size, kv_heads], where keys are int8; else None.
        value_scales: as key_scales.
    """

    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @classmethod
    def of(
        cls, shape: tuple[int, int], keys: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
    ) -> KVCache:
        """Make an empty one [blocks, block_size] for such keys and values [tokens, heads, size]."""
        caches = [it.new_zeros(*shape, *it.shape[1:], dtype=dtype) for it in (keys, values)]
        if dtype != torch.int8:
            return cls(*caches)
        scales = [it.new_zeros(*shape, it.shape[1], dtype=torch.float16) for it in (keys, values)]
        return cls(*caches, *scales)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that it holds."""
        every = (self.keys, self.values, self.key_scales, self.value_scales)
        return tuple(it for it in every if it is not None)

    def resized(self, num_blocks: int) -> KVCache:
        """Make an empty one of as many blocks."""
        return KVCache(*(it.new_zeros(num_blocks, *it.shape[1:]) for it in self.tensors))

    def gather(
        self, blocks: torch.Tensor, length: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of one sequence [length, kv_heads, size] in a dtype."""
        keys, values = (
            it[blocks].flatten(0, 1)[:length].to(dtype)
            if scales is None
            else it[blocks].flatten(0, 1)[:length].to(dtype)
            * scales[blocks].flatten(0, 1)[:length, :, None].to(dtype)
            for it, scales in ((self.keys, self.key_scales), (self.values, self.value_scales))
        )
        return keys, values


@dataclass(slots=True)
class Step:
    """What one forward pass reads.

    Attributes:
        attention: how to attend.
        caches: of each layer, once it has any.
        make_cache: makes a layer's cache, of its first keys and values [tokens, kv_heads, size].
        windows: the sizes of windows whose mask functions were asked what they show.
        slots: where the keys and values of each token go, int64 [tokens]; below 0 for nowhere.
        block_tables: the blocks of each sequence, int32 [sequences, blocks].
        lengths: positions of each sequence, those of this step included, int32 [sequences].
        counts: how many tokens of each sequence are read, where one has several; else None.
        known_lengths: `lengths`, where `counts` is not None.
        observed: takes how each layer attends, where somebody asks.
    """

    attention: PagedAttention
    caches: dict[int, KVCache]
    make_cache: Callable[[torch.Tensor, torch.Tensor], KVCache]
    windows: set[int | None]
    slots: torch.Tensor
    block_tables: torch.Tensor
    lengths: torch.Tensor
    counts: Sequence[int] | None = None
    known_lengths: Sequence[int] = ()
    observed: dict[int, Mapping[str, Any]] | None = None
    written: tuple[int, torch.Tensor] | None = field(default=None, init=False)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the new keys and values of a layer, [1, kv_heads, tokens, head_dim]."""
        if keys.dim() != 4 or keys.shape[0] != 1 or keys.shape[2] != len(self.slots):
            raise NotPaged(f"its keys have the shape {list(keys.shape)}")
        new_keys, new_values = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        cache = self.caches.get(layer)
        if cache is None:
            cache = self.caches[layer] = self.make_cache(new_keys, new_values)
        self.attention.write_cache(
            new_keys,
            new_values,
            cache.keys,
            cache.values,
            self.slots,
            key_scales=cache.key_scales,
            value_scales=cache.value_scales,
        )
        self.written = layer, keys

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend to all of each sequence: query [tokens, heads, head_dim] -> [.., value_dim]."""
        cache = self.caches[layer]
        how: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
        if self.observed is not None:
            self.observed[layer] = how
        if self.counts is None:
            return self.attention.decode(
                query, cache.keys, cache.values, self.block_tables, self.lengths,
                key_scales=cache.key_scales, value_scales=cache.value_scales, **how,
            )  # fmt: skip
        size = cache.keys.shape[1]
        parts, first = [], 0
        for i, (count, length) in enumerate(zip(self.counts, self.known_lengths, strict=True)):
            blocks = self.block_tables[i, : -(-length // size)]
            keys, values = cache.gather(blocks, length, query.dtype)
            parts.append(_attend_many(query[first : first + count], keys, values, **how))
            first += count
        return torch.cat(parts)


class StepCache(Cache):
    """What a class takes for its cache in a step: what is written into it goes to the blocks.

    Args:
        layers: how many the model has.
    """

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_StepLayer(i) for i in range(layers)])


class _StepLayer(DynamicLayer):
    def __init__(self, index: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._index = index

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new keys and values into the blocks; return them as they came."""
        del args, kwargs
        step: Step | None = getattr(_running, "step", None)
        if step is None:
            raise NotPaged("it keeps its cache for later")
        step.write(self._index, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self, *args: object) -> int:
        """Return 0: each token has its own position."""
        del args
        return 0

    def get_mask_sizes(self, query_length: Any, *args: object) -> tuple[int, int]:  # noqa: ANN401 - an int, or positions
        """Return the positions of a mask, and the first: nobody makes one."""
        del args
        return int(query_length if isinstance(query_length, int) else len(query_length)), 0


class attention_of:  # noqa: N801 - reads as a verb: with attention_of(model).running(step)
    """A model's attention, replaced while a step runs.

    Args:
        model: a causal language model.

    Raises:
        NotPaged: its class does not take attention functions.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - a transformers model
        if not getattr(model, "_supports_attention_backend", False):
            raise NotPaged("its class computes attention by itself")
        configs = {
            id(module.config): module.config
            for module in model.modules()
            if hasattr(getattr(module, "config", None), "_attn_implementation")
        }
        self._configs = list(configs.values())
        ALL_ATTENTION_FUNCTIONS.register(NAME, _forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)

    @contextmanager
    def running(self, step: Step) -> Iterator[None]:
        """Have the model attend as a step says, on this thread."""
        before = [config._attn_implementation for config in self._configs]  # noqa: SLF001 - where transformers keeps it
        _usual.name = next((name for name in before if name not in (None, NAME)), "sdpa")
        for config in self._configs:
            config._attn_implementation = NAME  # noqa: SLF001
        _running.step = step
        try:
            yield
        finally:
            _running.step = None
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation = name  # noqa: SLF001


class _Usual:
    """The attention of calls of other threads, while a step runs on this one."""

    name = "sdpa"


_usual = _Usual()


def _mask(*args: Any, mask_function: Any = None, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers' own types
    """Return which positions are visible, in place of a mask."""
    step: Step | None = getattr(_running, "step", None)
    if step is None:
        usual = ALL_MASK_ATTENTION_FUNCTIONS[_usual.name]
        return usual(*args, mask_function=mask_function, **kwargs)
    if kwargs.get("attention_mask") is not None:
        raise NotPaged("it masks some tokens")
    size: int | None = kwargs.get("local_size")
    if size not in step.windows:
        _check_window(mask_function, size)
        step.windows.add(size)
    return Window(size)


def _check_window(mask_function: Any, size: int | None) -> None:  # noqa: ANN401
    """Ask a mask function what it shows."""
    positions = range(40) if size is None else [0, 1, size - 1, size, size + 1, 2 * size + 1]
    keys = torch.arange(max(positions) + 2)
    zero = torch.tensor(0)
    for position in positions:
        try:
            shown = mask_function(zero, zero, torch.tensor(position), keys)
        except Exception as error:
            raise NotPaged("its attention mask is one of its own") from error
        first = 0 if size is None else position - size + 1
        if not torch.equal(torch.as_tensor(shown), (keys <= position) & (keys >= first)):
            raise NotPaged("its attention mask is neither causal nor a sliding window")


def _forward(
    module: Any,  # noqa: ANN401 - any attention module of transformers
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,  # noqa: ANN401 - a Window in a step
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, None]:
    """Attend, by transformers' interface: query [1, heads, tokens, head_dim]."""
    step: Step | None = getattr(_running, "step", None)
    if step is None:
        usual: Any = ALL_ATTENTION_FUNCTIONS[_usual.name]
        more = {"softcap": softcap, "s_aux": s_aux}
        kwargs |= {name: it for name, it in more.items() if it is not None}
        answer: tuple[torch.Tensor, None] = usual(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return answer
    if step.written is None or step.written[1] is not key:
        raise NotPaged("its layers attend to other keys than they keep")
    layer = step.written[0]
    window = attention_mask
    if not isinstance(window, Window):
        raise NotPaged("its attention mask is one of its own")
    strange = [
        name
        for name, it in kwargs.items()
        if name not in IGNORED and it is not None and it is not False
    ]
    if strange or not getattr(module, "is_causal", True):
        raise NotPaged(f"its attention takes {strange[0] if strange else 'no causal mask'}")
    step.written = None
    y = step.attend(
        query[0].transpose(0, 1),
        layer,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=window.size,
        softcap=softcap,
        sinks=s_aux,
    )
    return y[None], None


def _attend_many(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attend from the last tokens of a sequence [tokens, heads, head_dim] to all of it."""
    tokens, heads, length = query.shape[0], query.shape[1], keys.shape[0]
    q, k, v = (it.transpose(0, 1)[None] for it in (query, keys, values))
    whole = tokens == length and (window is None or window >= length)
    visible = None
    if not whole:
        at = torch.arange(length - tokens, length, device=query.device)[:, None]
        to = torch.arange(length, device=query.device)[None]
        visible = to <= at if window is None else (to <= at) & (to > at - window)
    if softcap is None and sinks is None:
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=whole, scale=scale, enable_gqa=heads != k.shape[1]
        )
        return y[0].transpose(0, 1)
    groups = heads // k.shape[1]
    k, v = (it.repeat_interleave(groups, dim=1) for it in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if visible is None:
        visible = torch.ones(tokens, length, dtype=torch.bool, device=query.device).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.float().view(1, heads, 1, 1).expand(1, heads, tokens, 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    y = weights.to(v.dtype) @ v
    return y[0].transpose(0, 1)
