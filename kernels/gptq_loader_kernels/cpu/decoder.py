"""Llama-like models through the native library: a decoding step in one call, and so a prompt.

The model stays transformers' own: the decoder's `forward` is asked first whether this call is new
tokens of one sequence, and everything else goes to transformers. Imports torch.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

from gptq_loader_kernels.cpu.caches import HeldCaches, give_room, is_roomy
from gptq_loader_kernels.cpu.describe import Described, describe, linears
from gptq_loader_kernels.cpu.library import Isa, load_library
from gptq_loader_kernels.cpu.library import Sequence as Sequence_
from gptq_loader_kernels.cpu.linear import TYPES, NativeLinear
from gptq_loader_plugin.generation.kv_cache import make_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CACHE", "MOST_TOKENS", "NativeStep"]

MOST_TOKENS = 8  # of a step; more are a prompt
STEADY = ("default", "linear", "llama3", "yarn")  # rotations that go by position alone
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
        self._built: Described | None = None
        self._held = HeldCaches()
        self._lock = threading.Lock()  # the library is told of one cache at a time

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what points into memory: a copy points into its own."""
        return self.__dict__ | {"_lock": None, "_built": None, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, with a lock of its own."""
        self.__dict__.update(state, _lock=threading.Lock(), _held=HeldCaches())

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - transformers' forward
        """Run a step or a prompt natively where it is one, else the decoder's own forward."""
        with self._lock:
            fit = None if args else self._fit(kwargs)
            if fit is not None:
                kept = None if kwargs.get("use_cache") is False else fit[1]
                y = self._run(fit[0], [fit[1]], [fit[0].shape[1]])
                return BaseModelOutputWithPast(last_hidden_state=y, **{CACHE: kept})
        return self.otherwise(*args, **kwargs)

    def _fit(self, given: dict[str, Any]) -> tuple[torch.Tensor, Any] | None:  # noqa: PLR0911 - one for each reason
        """Give embeddings [1, m, hidden] and the cache, where this is ours."""
        if torch.is_grad_enabled():
            return None
        given = dict(given)
        ids = given.pop("input_ids", None)
        before, after = given.pop("past_key_values", None), given.pop("cache", None)
        cache: Any = after if before is None else before  # the names until 5.23, and since
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
        give_room(cache)
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
        if not is_roomy(cache, len(self.decoder.layers), x.dtype):
            return None
        past: int = cache.layers[0].length
        if not _in_order(mask, positions, past, past + shape[1]) or not self._build(x.dtype):
            return None
        return x.contiguous(), cache

    def takes_prompts(self) -> bool:
        """Say whether more than a few tokens are taken natively."""
        return (
            self.isa >= Isa.BF16
            and self.decoder.norm.weight.dtype == torch.bfloat16
            and all(isinstance(it, NativeLinear) and not it.int8 for it in linears(self.decoder))
        )

    def step_many(
        self, tokens: Sequence[Sequence[int]], caches: Sequence[Any]
    ) -> torch.Tensor | None:
        """Read a few new tokens of each of some sequences, which need not be as long.

        Args:
            tokens: of each sequence, 1 to 8.
            caches: one of each sequence; what is read is added to it.

        Returns:
            The decoder's states [tokens of all, hidden], or None where this cannot be done here.
        """
        if self.decoder.forward not in (self.forward, self.otherwise):
            return None  # it was replaced since, by what is to see every call
        if torch.is_grad_enabled() or not all(0 < len(it) <= MOST_TOKENS for it in tokens):
            return None
        with self._lock:
            x = self.decoder.embed_tokens(torch.tensor([[it for ids in tokens for it in ids]]))
            layers = len(self.decoder.layers)
            if x.dtype not in TYPES or x.device.type != "cpu" or not self._keeps_angles():
                return None
            for cache in caches:
                give_room(cache)
                if not is_roomy(cache, layers, x.dtype):
                    return None
            if not self._build(x.dtype):
                return None
            states: torch.Tensor = self._run(x, caches, [len(it) for it in tokens])[0]
            return states

    def _keeps_angles(self) -> bool:
        """Say whether a position's rotation is the same however long its sequence is."""
        return getattr(self.decoder.rotary_emb, "rope_type", "default") in STEADY

    def _run(self, x: torch.Tensor, caches: Sequence[Any], tokens: Sequence[int]) -> torch.Tensor:
        built = self._built
        assert built is not None
        sequences = (Sequence_ * len(caches))()
        positions: list[int] = []
        for sequence, cache, count in zip(sequences, caches, tokens, strict=True):
            past = sequence.past = cache.layers[0].length
            sequence.tokens = count
            sequence.caches = self._held.reserve(cache, past + count, built.model, x.dtype)
            positions.extend(range(past, past + count))
        cos, sin = self.decoder.rotary_emb(x[:, :0].float(), torch.tensor([positions]))
        cos, sin, y = cos.contiguous(), sin.contiguous(), torch.empty_like(x)
        given = (
            ctypes.addressof(built.model), x.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            ctypes.addressof(sequences),
        )  # fmt: skip
        threads, library = torch.get_num_threads(), load_library()
        if max(tokens) > MOST_TOKENS:
            failed = library.gptq_prompt(*given, y.data_ptr(), self.amx, threads)
            self.prompts += 1
        else:
            failed = library.gptq_step(*given, len(caches), y.data_ptr(), threads)
            self.steps += 1
        if failed:
            raise MemoryError(f"no memory for {len(positions)} tokens")
        for cache, count in zip(caches, tokens, strict=True):
            for layer in cache.layers:
                layer.length += count
        return y

    def _build(self, dtype: torch.dtype) -> bool:
        """Describe the decoder to the library, anew where something in it was changed."""
        built = self._built
        if built is None or built.dtype != dtype or not built.watch.unchanged():
            self._built = describe(self.decoder, dtype, self.isa)
        return self._built is not None


def _in_order(
    mask: torch.Tensor | None, positions: torch.Tensor | None, past: int, end: int
) -> bool:
    """Say whether tokens follow what is in the cache, none of it masked."""
    if mask is not None and (mask.shape != (1, end) or not bool(mask.all())):
        return False
    return positions is None or positions.flatten().tolist() == list(range(past, end))
