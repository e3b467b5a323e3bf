"""Models through the native library: a decoding step in one call, and so a prompt.

The model stays transformers' own: the decoder's `forward` is asked first whether this call is new
tokens of one sequence, and everything else goes to transformers. Imports torch.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast

from gptq_loader_kernels.cpu.angles import Angles
from gptq_loader_kernels.cpu.caches import HeldCaches, is_growable, make_growable
from gptq_loader_kernels.cpu.describe import Described, describe
from gptq_loader_kernels.cpu.families import family_of
from gptq_loader_kernels.cpu.fitting import linears
from gptq_loader_kernels.cpu.library import Activations, Isa, choose_code, load_library
from gptq_loader_kernels.cpu.library import Sequence as Sequence_
from gptq_loader_kernels.cpu.linear import TYPES, NativeLinear
from gptq_loader_kernels.cpu.parts import embed, last_norm_of
from gptq_loader_plugin.generation.cache_layers import GrowableLayer, LatentLayer
from gptq_loader_plugin.generation.kv_cache import make_cache
from gptq_loader_plugin.generation.rotation import rope_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["CACHE", "MAX_STEP_TOKENS", "NativeDecoder"]

MAX_STEP_TOKENS = 8  # of a step; more are a prompt
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class NativeDecoder:
    """The forward of a decoder: its own, or for new tokens of one sequence the native library's.

    A few tokens are a step, of which some layers may be unpacked and which may be in float32. More
    are a prompt, which wants bfloat16, every layer packed, a processor with its products, and other
    than latent attention.

    Args:
        decoder: the model without its head, of one of FAMILIES and as `why_not` wants it.
        isa: the code to run, by default the best the processor has.
        activations: what bfloat16 is multiplied as, by default the fastest that rounds nothing.
        amx: whether prompts are multiplied by its matrix unit, by default where it has one.
    """

    def __init__(
        self,
        decoder: Any,  # noqa: ANN401 - any of FAMILIES
        *,
        isa: Isa | None = None,
        activations: Activations | None = None,
        amx: bool | None = None,
    ) -> None:
        self.decoder = decoder
        family = family_of(decoder)
        assert family is not None
        self.family = family
        self.isa, self.activations = choose_code(isa, activations)
        self.amx = bool(load_library().gptq_amx()) if amx is None else amx
        self.otherwise: Callable[..., Any] = decoder.forward
        self.steps = self.prompts = 0  # taken natively
        self._built: Described | None = None
        self._held = HeldCaches()
        self._kind = LatentLayer if family.latent else GrowableLayer  # of its caches' layers
        self._angles = Angles(repeated=family.angles_repeated, once=family.angles_once)
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
            # The first argument of every decoder's forward; GPT-NeoX passes it by its place.
            call = {"input_ids": args[0], **kwargs} if len(args) == 1 else kwargs
            fit = None if len(args) > 1 else self._fit(call)
            if fit is not None:
                kept = None if kwargs.get("use_cache") is False else fit[1]
                y = self._run(fit[0], [fit[1]], [fit[0].shape[1]])
                mixed = self.family.expert_size is not None
                answer = MoeModelOutputWithPast if mixed else BaseModelOutputWithPast
                return answer(last_hidden_state=y, **{CACHE: kept})
        return self.otherwise(*args, **kwargs)

    def _fit(self, arguments: dict[str, Any]) -> tuple[torch.Tensor, Any] | None:
        """Give embeddings [1, m, hidden] and the cache, where this is ours."""
        call = None if self._trains() else _Call.of(arguments)
        if call is None or call.tokens.shape[0] != 1 or call.tokens.shape[1] == 0:
            return None
        make_growable(call.cache, self._kind)  # whoever reads these tokens: steps may follow
        prompt = call.tokens.shape[1] > MAX_STEP_TOKENS
        if prompt and not self.takes_prompts():
            return None
        cache: Any = make_cache(self.decoder) if prompt and call.cache is None else call.cache
        x = (
            embed(self.decoder, self.family, call.tokens)
            if call.embedded is None
            else call.embedded
        )
        if x.device.type != "cpu" or x.dtype not in ((torch.bfloat16,) if prompt else TYPES):
            return None
        built = self._build(x.dtype)
        if built is None or x.shape[2:] != (built.model.hidden,):
            return None
        if not is_growable(cache, built.model, x.dtype):
            return None
        past: int = cache.layers[0].length
        ours = self._keeps_angles(past + x.shape[1]) and call.goes_on_from(past)
        return (x.contiguous(), cache) if ours else None

    def takes_prompts(self) -> bool:
        """Say whether more than a few tokens are taken natively."""
        return (
            self.isa >= Isa.AVX512_BF16
            and not self.family.latent
            and last_norm_of(self.decoder, self.family).weight.dtype == torch.bfloat16
            and all(
                isinstance(linear, NativeLinear) and linear.activations is not Activations.INT8
                for linear in linears(self.decoder, self.family)
            )
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
        if len(tokens) != len(caches) or len(set(map(id, caches))) != len(caches):
            raise ValueError(f"{len(tokens)} sequences need as many caches, each its own")
        decoder = self.decoder
        hooked = decoder._forward_hooks or decoder._forward_pre_hooks  # noqa: SLF001 - torch has no other way to tell
        if hooked or decoder.forward not in (self.forward, self.otherwise):
            return None  # something is to see every call
        if self._trains() or not all(0 < len(it) <= MAX_STEP_TOKENS for it in tokens):
            return None
        with self._lock:
            ids = torch.tensor([[it for ids in tokens for it in ids]], device="cpu")
            x = embed(self.decoder, self.family, ids)
            if x.dtype not in TYPES or x.device.type != "cpu":
                return None
            built = self._build(x.dtype)
            pairs = zip(caches, tokens, strict=True)
            if built is None or not all(self._takes(it, len(new), built) for it, new in pairs):
                return None
            states: torch.Tensor = self._run(x, caches, [len(it) for it in tokens])[0]
            return states

    def _takes(self, cache: Any, tokens: int, built: Described) -> bool:  # noqa: ANN401
        """Return whether so many tokens can be added to a cache, which is made growable."""
        if not self._held.knows(cache, built.model):
            make_growable(cache, self._kind)
            if not is_growable(cache, built.model, built.dtype):
                return False
        return self._keeps_angles(cache.layers[0].length + tokens)

    def _trains(self) -> bool:
        """Return whether gradients are kept, or something may be dropped."""
        return torch.is_grad_enabled() or bool(self.decoder.training)

    def _keeps_angles(self, length: int) -> bool:
        """Return whether every sequence of up to `length` positions is rotated alike.

        Where rotations go by the length, what is beyond is transformers', as the caller has it.
        """
        limit = rope_limit(self.decoder.rotary_emb)
        return limit is None or length < limit

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
        multiplier = getattr(self.decoder, "embedding_multiplier", None)
        if multiplier is not None:
            x = x * multiplier
        cos, sin = self._angles.of(self.decoder.rotary_emb, positions, built)
        y = torch.empty_like(x)
        arguments = (
            ctypes.addressof(built.model), x.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            ctypes.addressof(sequences),
        )  # fmt: skip
        threads, library = torch.get_num_threads(), load_library()
        if max(tokens) > MAX_STEP_TOKENS:
            failed = library.gptq_prefill(*arguments, y.data_ptr(), self.amx, threads)
            self.prompts += 1
        else:
            failed = library.gptq_decode_step(*arguments, len(caches), y.data_ptr(), threads)
            self.steps += 1
        if failed:
            raise MemoryError(f"no memory for {len(positions)} tokens")
        for cache, count in zip(caches, tokens, strict=True):
            for layer in cache.layers:
                layer.length += count
        return y

    def _build(self, dtype: torch.dtype) -> Described | None:
        """Describe the decoder to the library, anew where something in it was changed."""
        built = self._built
        if built is None or built.dtype != dtype or not built.watch.unchanged():
            self._built = describe(self.decoder, dtype, self.isa, self.activations)
        return self._built


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a decoder that asks for its states, and nothing else."""

    tokens: torch.Tensor  # ids [sequences, m], or their embeddings [sequences, m, hidden]
    embedded: torch.Tensor | None
    cache: Any
    mask: torch.Tensor | None
    positions: torch.Tensor | None

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> _Call | None:
        """Read the arguments of transformers' forward; None where one asks for more."""
        arguments = dict(arguments)
        ids, embedded = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
        before, after = arguments.pop("past_key_values", None), arguments.pop("cache", None)
        mask, positions = arguments.pop("attention_mask", None), arguments.pop("position_ids", None)
        for name in ("use_cache", "cache_position", "return_dict"):
            arguments.pop(name, None)
        if any(value is not None and value is not False for value in arguments.values()):
            return None
        if (ids is None) == (embedded is None):
            return None  # transformers says what is wrong with that
        tokens = ids if embedded is None else embedded
        cache = after if before is None else before  # the names until 5.23, and since
        return cls(tokens, embedded, cache, mask, positions)

    def goes_on_from(self, past: int) -> bool:
        """Say whether the tokens follow `past` ones that are in the cache, none of it masked."""
        end = past + self.tokens.shape[1]
        mask, positions = self.mask, self.positions
        if mask is not None:  # a mask of each type of layer is a dict
            plain = isinstance(mask, torch.Tensor) and mask.shape == (1, end)
            if not plain or not bool(mask.all()):
                return False
        return positions is None or positions.flatten().tolist() == list(range(past, end))
