"""Llama-like models through the native library: a decoding step in one call, and so a prompt.

The model stays transformers' own: the decoder's `forward` is asked first whether this call is new
tokens of one sequence, and everything else goes to transformers. Imports torch.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from gptq_loader_kernels._native import (
    NORMS,
    PARTS,
    Block,
    Isa,
    Model,
    Projection,
    load_library,
)
from gptq_loader_kernels._native_linear import TYPES, NativeLinear
from gptq_loader_kernels._watch import Watch, modules_inside
from gptq_loader_plugin.kv_cache import RoomyLayer, make_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["CACHE", "MOST_TOKENS", "NativeStep", "all_packed", "why_not"]

FAMILIES = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
MOST_TOKENS = 8  # of a step; more are a prompt
LANES = 16
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class NativeStep:
    """The forward of a decoder: its own, or for new tokens of one sequence the native library's.

    A few tokens are a step, of which some layers may be unpacked and which may be in float32. More
    are a prompt, which wants bfloat16, every layer packed, and a processor with its products.

    Args:
        decoder: the model without its head, of one of FAMILIES and as `why_not` wants it.
        isa: the code to run, by default the best the processor has.
        amx: whether prompts are multiplied by its matrix unit, by default where it has one.
    """

    def __init__(
        self,
        decoder: Any,  # noqa: ANN401 - any of FAMILIES
        *,
        isa: Isa | None = None,
        amx: bool | None = None,
    ) -> None:
        self.decoder = decoder
        self.isa = Isa(load_library().gptq_isa()) if isa is None else isa
        self.amx = bool(load_library().gptq_amx()) if amx is None else amx
        self.otherwise: Callable[..., Any] = decoder.forward
        self.steps = self.prompts = 0  # taken natively
        self._built: tuple[Model, Any, list[Any], Watch, torch.dtype] | None = None
        self._lock = threading.Lock()  # the library is told of one cache at a time

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what points into memory: a copy points into its own."""
        return {key: value for key, value in self.__dict__.items() if key != "_lock"} | {
            "_built": None
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with a lock of its own."""
        self.__dict__.update(state, _lock=threading.Lock())

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers' forward
        """Run a step or a prompt natively where it is one, else the decoder's own forward."""
        with self._lock:
            fit = None if args else self._fit(kwargs)
            if fit is not None:
                kept = None if kwargs.get("use_cache") is False else fit[1]
                return BaseModelOutputWithPast(last_hidden_state=self._run(*fit), **{CACHE: kept})
        return self.otherwise(*args, **kwargs)

    def _fit(self, given: dict[str, Any]) -> tuple[torch.Tensor, Any, int] | None:  # noqa: PLR0911 - one for each reason
        """Give embeddings [1, m, hidden], the cache and its length, where this is ours."""
        if torch.is_grad_enabled():
            return None
        given = dict(given)
        ids = given.pop("input_ids", None)
        before, after = given.pop("past_key_values", None), given.pop("cache", None)
        cache: Any = (
            after if before is None else before
        )  # the name until transformers 5.23, and since
        embedded, mask = given.pop("inputs_embeds", None), given.pop("attention_mask", None)
        positions = given.pop("position_ids", None)
        given.pop("use_cache", None)
        given.pop("cache_position", None)
        given.pop("return_dict", None)
        if any(value is not None and value is not False for value in given.values()):
            return None
        shape = (ids if embedded is None else embedded).shape
        if shape[0] != 1 or shape[1] == 0:
            return None
        _give_room(cache)
        prompt = shape[1] > MOST_TOKENS
        if prompt and not self.takes_prompts():
            return None
        if prompt and cache is None:
            cache = make_cache(self.decoder)
        x = self.decoder.embed_tokens(ids) if embedded is None else embedded
        if x.dtype not in TYPES or x.device.type != "cpu":
            return None
        if prompt and x.dtype != torch.bfloat16:
            return None
        if not _is_roomy(cache, len(self.decoder.layers), x.dtype):
            return None
        past: int = cache.layers[0].length
        if not _in_order(mask, positions, past, past + shape[1]) or not self._build(x.dtype):
            return None
        return x.contiguous(), cache, past

    def takes_prompts(self) -> bool:
        """Say whether more than a few tokens are taken natively."""
        return (
            self.isa >= Isa.BF16
            and self.decoder.norm.weight.dtype == torch.bfloat16
            and all(isinstance(it, NativeLinear) and not it.int8 for it in _linears(self.decoder))
        )

    def _run(self, x: torch.Tensor, cache: Any, past: int) -> torch.Tensor:  # noqa: ANN401
        built = self._built
        assert built is not None
        model, blocks, *_ = built
        tokens = x.shape[1]
        like = torch.empty(1, model.kv_heads, 0, model.head_dim, dtype=x.dtype)
        for block, layer in zip(blocks, cache.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(like, like)
            room = layer.reserve(past + tokens, like)
            block.capacity = room.shape[3]
            block.keys = room.data_ptr()
            block.values = room.data_ptr() + room.stride(0) * room.element_size()
        positions = torch.arange(past, past + tokens)[None]
        cos, sin = self.decoder.rotary_emb(x.float(), positions)
        cos, sin = cos.contiguous(), sin.contiguous()
        y = torch.empty_like(x)
        given = (
            ctypes.addressof(model), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), past, tokens,
            y.data_ptr(),
        )  # fmt: skip
        threads, library = torch.get_num_threads(), load_library()
        if tokens > MOST_TOKENS:
            failed = library.gptq_prompt(*given, self.amx, threads)
            self.prompts += 1
        else:
            failed = library.gptq_step(*given, threads)
            self.steps += 1
        if failed:
            raise RuntimeError(f"no memory for {tokens} tokens")
        for layer in cache.layers:
            layer.length = past + tokens
        return y

    def _build(self, dtype: torch.dtype) -> bool:
        """Describe the decoder to the library, anew where something in it was changed."""
        if self._built is not None and self._built[4] == dtype and self._built[3].unchanged():
            return True
        self._built = None
        if why_not(self.decoder) is not None:
            return False
        if self.decoder.norm.weight.dtype != dtype and not all_packed(self.decoder):
            return False
        decoder = self.decoder
        kept: list[Any] = []

        def norm(owner: nn.Module, path: str) -> int | None:
            module = _find(owner, path)
            if module is None:
                return None
            kept.append(module.weight.detach().float().contiguous())
            return int(kept[-1].data_ptr())

        blocks = (Block * len(decoder.layers))()
        for block, layer in zip(blocks, decoder.layers, strict=True):
            before: Any = None
            for name, path in PARTS.items():
                module = layer.get_submodule(path)
                _describe(getattr(block, name), module, dtype, kept)
                follows = name in {"k", "v", "up"} and _same_rows(before, module)
                getattr(block, name).same_rows = follows
                before = module
            for name, path in NORMS.items():
                setattr(block, name, norm(layer, path))
            block.window = getattr(layer.self_attn, "sliding_window", None) or (
                decoder.config.sliding_window or 0
                if type(decoder).__name__ == "MistralModel"
                else 0
            )
        config, first = decoder.config, decoder.layers[0]
        attention = first.self_attn
        model = Model(
            blocks=len(blocks),
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            inner=config.intermediate_size,
            type=TYPES[dtype],
            isa=self.isa,
            eps=config.rms_norm_eps,
            scale=attention.scaling,
            norm=norm(decoder, "norm"),
            block=ctypes.cast(blocks, ctypes.POINTER(Block)),
        )
        self._built = model, blocks, kept, Watch(decoder), dtype
        return True


def why_not(decoder: Any) -> str | None:  # noqa: ANN401 - one for each limit
    """Say what keeps a decoder from stepping natively, in words."""
    kind = type(decoder).__name__
    if kind not in FAMILIES or not type(decoder).__module__.startswith("transformers.models."):
        return "it is not one of Llama, Mistral, Qwen2 and Qwen3"
    config = decoder.config
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}; the step has silu"
    attention = decoder.layers[0].self_attn
    if attention.head_dim % (2 * LANES) or attention.head_dim > 16 * LANES:
        return f"its heads are {attention.head_dim} wide; the step takes multiples of 32 up to 256"
    if config.hidden_size % LANES:
        return f"its hidden size {config.hidden_size} is not a multiple of {LANES}"
    if decoder.norm.weight.dtype not in TYPES:
        return f"it is in {decoder.norm.weight.dtype}; the step takes bfloat16 and float32"
    return _changed(decoder)


def _changed(decoder: Any) -> str | None:  # noqa: ANN401
    """Say which part of a decoder is not as transformers and the native kernel make it."""
    for layer in decoder.layers:
        for path in PARTS.values():
            module = _find(layer, path)
            if not isinstance(module, NativeLinear) and type(module) is not nn.Linear:
                return f"{path} is multiplied by another kernel"
    for module in modules_inside(decoder):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:  # noqa: SLF001 - torch has no other way to tell
            return f"something watches a {type(module).__name__} of it"
    return None


def all_packed(decoder: Any) -> bool:  # noqa: ANN401
    return all(isinstance(it, NativeLinear) for it in _linears(decoder))


def _linears(decoder: Any) -> Iterator[Any]:  # noqa: ANN401
    return (_find(layer, path) for layer in decoder.layers for path in PARTS.values())


def _describe(to: Projection, module: Any, dtype: torch.dtype, kept: list[Any]) -> None:  # noqa: ANN401
    to.in_features, to.out_features = module.in_features, module.out_features
    if isinstance(module, NativeLinear):
        filled = module.filled()
        kept.append((module, filled))
        to.packed = ctypes.pointer(filled)
        return
    weight = module.weight.detach().to(dtype).contiguous()
    kept.append(weight)
    to.weight = weight.data_ptr()
    if module.bias is not None:
        kept.append(module.bias.detach().float().contiguous())
        to.bias = kept[-1].data_ptr()


def _same_rows(one: Any, other: Any) -> bool:  # noqa: ANN401 - modules of either kind
    """Say whether two layers read x alike, so that it is gathered once for both."""
    if not isinstance(one, NativeLinear) or not isinstance(other, NativeLinear):
        return type(one) is type(other)
    names = ("rows", "segment_units")
    return one.bits == other.bits and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in names
    )


def _find(owner: Any, path: str) -> Any:  # noqa: ANN401
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _in_order(
    mask: torch.Tensor | None, positions: torch.Tensor | None, past: int, end: int
) -> bool:
    """Say whether tokens follow what is in the cache, none of it masked."""
    if mask is not None and (mask.shape != (1, end) or not bool(mask.all())):
        return False
    return positions is None or positions.flatten().tolist() == list(range(past, end))


def _is_roomy(cache: Any, layers: int, dtype: torch.dtype) -> bool:  # noqa: ANN401 - transformers' caches
    """Say whether a cache is one the step writes."""
    if type(cache) is not DynamicCache or len(cache.layers) != layers:
        return False
    for layer in cache.layers:
        if type(layer) is not RoomyLayer:
            return False
        room: torch.Tensor | None = layer.room
        if room is not None and (room.dtype != dtype or room.shape[1] != 1):
            return False
    return True


def _give_room(cache: Any) -> None:  # noqa: ANN401
    """Give transformers' own layers room: plain ones, and sliding ones that are empty."""
    if type(cache) is not DynamicCache:
        return
    for layer in cache.layers:
        empty = type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized
        if type(layer) is DynamicLayer or empty:
            _make_roomy(layer)


def _make_roomy(layer: Any) -> None:  # noqa: ANN401 - a DynamicLayer
    """Turn transformers' own layer of a cache into one with room, keeping what it holds."""
    keys, values = layer.__dict__.pop("keys", None), layer.__dict__.pop("values", None)
    layer.__class__ = RoomyLayer
    if keys is not None and keys.numel():
        layer.room = torch.stack((keys, values))
        layer.length = keys.shape[-2]
