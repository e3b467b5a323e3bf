"""Run a model over many sequences in one pass, with their keys and values in blocks."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.engine.attention import KVCache, NotPaged, Step, StepCache, attention_of
from gptq_loader_plugin.engine.block_pool import BlockPool, BlockTable
from gptq_loader_plugin.engine.decode_graphs import DecodeGraphs
from gptq_loader_plugin.engine.fused_decoder import FusedDecoder, NotFused, Observed, observing
from gptq_loader_plugin.engine.model_limits import plain_layers, tolerance_of
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.generation.rotation import LengthRotation
from gptq_loader_plugin.kernel import FusedOperators
from gptq_loader_plugin.model.experts import stack_experts
from gptq_loader_plugin.system.device_memory import free_device_memory
from gptq_loader_plugin.transformers_compat import find_cache_argument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from gptq_loader_plugin.kernel import PagedAttention

__all__ = ["PagedEngine"]

BLOCK_SIZE = 16  # positions
PROBE = (5, 1, 1)  # tokens of the steps that a model is tried with
# Sequences, of which the one in the middle counts: after some tokens, which no text brings, a model
# in 16 bits is off by a fifth of its logits, however it is computed.
PROBES = 3
KV_SHARE = 0.6  # of the memory that is free, for keys and values


class PagedEngine:
    """A model that reads tokens of many sequences in one pass.

    Args:
        model: a causal language model, every tensor on one device.
        attention: how to attend to blocks.
        context: the longest sequence.
        int8: whether keys and values are kept in 8 bits, a scale for each head and position.

    Attributes:
        rotation: how the model rotates sequences of different lengths.
        max_sequences: for how many of the longest sequences there is room, where memory allows.
        pool: which block holds what.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: PagedAttention,
        context: int,
        *,
        int8: bool = False,
    ) -> None:
        self._model: Any = model
        self._attention = attention
        self._context, self._int8 = context, int8
        self._lock = threading.RLock()
        self._layers = plain_layers(model)
        self._running = attention_of(model)
        self._cache = StepCache(self._layers)
        name = find_cache_argument(model)
        if name is None:
            raise NotPaged("it takes no cache")
        self._cache_name = name
        self._caches: dict[int, KVCache] = {}
        self._windows: set[int | None] = set()
        self._graphs: DecodeGraphs | None = None
        self._observed = Observed()
        self._fused: FusedDecoder | None = None
        self._room = 0  # blocks that were asked for last
        self.max_sequences = 1
        self.rotation = LengthRotation(model)
        self.pool = BlockPool(0, BLOCK_SIZE)

    @property
    def runs_ahead(self) -> bool:
        """Whether the device computes a step while the host goes on, and rotations never change."""
        return self._model.device.type == "cuda" and not self.rotation.varies

    @property
    def fused(self) -> bool:
        """Whether a step of one token a sequence takes fewer kernels than the model's layers."""
        return self._fused is not None

    @property
    def block_bytes(self) -> int:
        """The bytes of one block, in every layer."""
        tensors = (it for cache in self._caches.values() for it in cache.tensors)
        return sum(it.shape[1:].numel() * it.element_size() for it in tensors)

    @property
    def num_blocks_per_sequence(self) -> int:
        """The blocks of the longest sequence."""
        return -(-self._context // BLOCK_SIZE)

    def probe(self) -> None:
        """Try the model with and without the engine.

        Raises:
            NotPaged: it answers otherwise, or does what the engine does not.
        """
        self._observed = Observed()
        tolerance = tolerance_of(self._model, int8=self._int8)
        count = min(sum(PROBE), self._context)
        vocabulary = self._model.config.get_text_config().vocab_size
        ids = [
            [(300 + 997 * i + 131 * which) % vocabulary for i in range(count)]
            for which in range(PROBES)
        ]
        with torch.inference_mode():
            expected = self._model(input_ids=torch.tensor(ids, device=self._model.device)).logits
            self.resize(PROBES)
            tables = [BlockTable(self.pool) for _ in ids]
            first = 0
            for size in PROBE:
                parts = [it[first : first + size] for it in ids]
                if not parts[0]:
                    break
                first += len(parts[0])
                with observing(self._model, self._observed) if first <= size else nullcontext():
                    logits = self.step(parts, tables, [count] * PROBES).float()
                right = expected[:, first - 1].float()
                errors = (logits - right).norm(dim=-1) / right.norm(dim=-1).clamp_min(1e-12)
                error = float(errors.median())
                if not error <= tolerance:
                    raise NotPaged(f"its logits differ by {error:.1%} in blocks")
        if len(self._caches) != self._layers:
            raise NotPaged("some of its layers keep no keys and values")

    def fuse(self) -> str:
        """Have steps of one token a sequence take fewer kernels, where the model's class allows.

        To be called after `probe`, which saw what its layers do.

        Returns:
            What was found in words, as part of a sentence.
        """
        experts = "" if stack_experts(self._model) else ", experts looked up by the host"
        otherwise = f"its layers are transformers' own{experts}"
        if not isinstance(self._attention, FusedOperators):
            return otherwise
        try:
            with torch.inference_mode(mode=False):
                self._fused = FusedDecoder(self._model, self._attention, self._observed)
            self.probe()
        except (NotFused, NotPaged, AttributeError, TypeError, RuntimeError, ValueError) as reason:
            self._fused = None
            return f"{otherwise}: {str(reason).partition(chr(10))[0][:200]}"
        return f"norms, rotations and products of its layers are fused{experts}"

    def resize(self, num_blocks: int) -> None:
        """Have so many blocks; what the old ones hold is forgotten.

        Nobody may hold a block.
        """
        with self._lock:
            if self.pool.free_blocks() != self.pool.num_blocks:
                raise GPTQLoaderError(
                    "the key-value cache is in use", hint="wait until all replies have ended"
                )
            self._graphs = None
            self.pool = BlockPool(num_blocks, BLOCK_SIZE)
            for layer, old in list(self._caches.items()):
                self._caches[layer] = old.resized(num_blocks)

    @torch.inference_mode()
    def step(
        self,
        tokens: Sequence[Sequence[int]],
        caches: Sequence[BlockTable],
        lengths: Sequence[int],
        *,
        eager: bool = False,
    ) -> torch.Tensor:
        """Read new tokens of some sequences.

        Args:
            tokens: of each sequence.
            caches: the blocks of each; what is read is added to them.
            lengths: of each sequence, what is read later included: some models rotate by it.
            eager: whether to run the model's own layers, by no graph.

        Returns:
            The logits after the last token of each [sequences, vocabulary].

        Raises:
            GPTQLoaderError: there is no room for them.
        """
        with self._lock:
            slots = [table.reserve(len(part)) for part, table in zip(tokens, caches, strict=True)]
            if self.rotation.varies:
                logits = self._read_by_rotation(tokens, caches, slots, lengths)
            elif not eager and all(len(part) == 1 for part in tokens):
                logits = self._decode([part[0] for part in tokens], caches, [it[0] for it in slots])
            else:
                logits = self._read(tokens, caches, slots)
            for part, table in zip(tokens, caches, strict=True):
                table.append(part)
            return logits

    @torch.inference_mode()
    def step_ahead(self, tokens: torch.Tensor, caches: Sequence[BlockTable]) -> torch.Tensor:
        """Read a token of each of some sequences, whose values only the device knows yet.

        Args:
            tokens: int64 [sequences].
            caches: the blocks of each; `append` adds the tokens to them once they are known.

        Returns:
            As `step`.

        Raises:
            GPTQLoaderError: there is no room for them.
        """
        with self._lock:
            return self._decode(tokens, caches, [table.reserve(1)[0] for table in caches])

    def append(self, tokens: Sequence[int], caches: Sequence[BlockTable]) -> None:
        """Note which tokens `step_ahead` has read."""
        with self._lock:
            for token, table in zip(tokens, caches, strict=True):
                table.append([token])

    def make(self, model: PreTrainedModel, rotation: tuple[int, ...] = ()) -> BlockTable:
        """Make an empty table of blocks."""
        del model
        with self._lock:
            self._grow()
            return BlockTable(self.pool, rotation)

    def reuse(
        self, model: PreTrainedModel, ids: Sequence[int], rotation: tuple[int, ...] = ()
    ) -> tuple[BlockTable, int]:
        """Return a table whose blocks hold the beginning of `ids`, and how many tokens that is."""
        table = self.make(model, rotation)
        return table, table.reuse(ids)

    def store(self, ids: list[int], cache: BlockTable, rotation: tuple[int, ...] = ()) -> None:
        """Give the blocks of a sequence back; full ones stay known until their room is needed."""
        del ids, rotation
        cache.release()

    def clear(self) -> None:
        """Forget every prefix."""
        self.pool.clear()

    def close(self) -> None:
        """Free the memory."""
        with self._lock:
            self._graphs = None
            self._caches.clear()
            self.pool = BlockPool(0, BLOCK_SIZE)

    def reserve(self, sequences: int) -> int:
        """Have room for so many sequences; return the bytes that running ones may fill."""
        with self._lock:
            self.max_sequences = sequences
            self._grow()
            # The last block of each is full to its last position at the best.
            return max(self.pool.num_blocks - sequences, 0) * self.block_bytes

    def _grow(self) -> None:
        """Make room for `max_sequences` and one more, or as many as there is memory for."""
        needed = (self.max_sequences + 1) * self.num_blocks_per_sequence
        if self.pool.num_blocks >= needed or self.pool.free_blocks() != self.pool.num_blocks:
            return
        if self._room == needed:  # it was tried
            return
        self._room = needed
        self.resize(0)
        fitting = int(free_device_memory(self._model.device) * KV_SHARE) // self.block_bytes
        if fitting < 1:
            raise GPTQLoaderError(
                "there is no memory left for keys and values",
                hint="load a smaller model, or a shorter context: context=2048",
            )
        self.resize(min(needed, fitting))

    def _read_by_rotation(
        self,
        tokens: Sequence[Sequence[int]],
        tables: Sequence[BlockTable],
        slots: Sequence[Sequence[int]],
        lengths: Sequence[int],
    ) -> torch.Tensor:
        """Read in one pass each those sequences that are rotated alike."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, length in enumerate(lengths):
            groups.setdefault(self.rotation.of(length), []).append(i)
        parts: dict[int, torch.Tensor] = {}
        for group in groups.values():
            with self.rotation.applied(lengths[group[0]]):
                logits = self._read(
                    [tokens[i] for i in group],
                    [tables[i] for i in group],
                    [slots[i] for i in group],
                )
            parts |= dict(zip(group, logits, strict=True))
        return torch.stack([parts[i] for i in range(len(tokens))])

    def _decode(
        self,
        tokens: Sequence[int] | torch.Tensor,
        tables: Sequence[BlockTable],
        slots: Sequence[int],
    ) -> torch.Tensor:
        """Read one token of each sequence."""
        if self._graphs is None:
            self._graphs = DecodeGraphs(self._run, self._model, self.num_blocks_per_sequence)
        positions = [len(table) for table in tables]
        logits = self._graphs.run(tokens, positions, slots, [table.blocks for table in tables])
        return logits.clone()  # the next step, of another thread maybe, overwrites them

    def _read(
        self,
        tokens: Sequence[Sequence[int]],
        tables: Sequence[BlockTable],
        slots: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """Read several tokens of some sequences."""
        device = self._model.device
        positions = [
            range(len(table), len(table) + len(part))
            for part, table in zip(tokens, tables, strict=True)
        ]
        counts = [len(part) for part in tokens]
        lengths = [it.stop for it in positions]
        widest = max(len(table.blocks) for table in tables)
        blocks = [table.blocks + [0] * (widest - len(table.blocks)) for table in tables]
        step = self._step(
            torch.tensor([it for part in slots for it in part], device=device),
            torch.tensor(blocks, dtype=torch.int32, device=device),
            torch.tensor(lengths, dtype=torch.int32, device=device),
        )
        step.counts, step.known_lengths = counts, lengths
        return self._run_step(
            torch.tensor([[it for part in tokens for it in part]], device=device),
            torch.tensor([[it for part in positions for it in part]], device=device),
            step,
            torch.tensor(counts, device=device).cumsum(0) - 1,
        )

    def _run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        block_tables: torch.Tensor,
        lengths: torch.Tensor,
    ) -> torch.Tensor:
        """Read one token of each sequence: int64 [sequences] -> logits [sequences, vocabulary]."""
        step = self._step(slots, block_tables, lengths)
        if self._fused is not None and self._fused.unchanged():
            return self._fused(tokens, positions, step)
        return self._run_step(tokens[None], positions[None], step, 0)

    def _step(self, slots: torch.Tensor, block_tables: torch.Tensor, lengths: torch.Tensor) -> Step:
        return Step(
            self._attention,
            self._caches,
            self._make_cache,
            self._windows,
            slots,
            block_tables,
            lengths,
            observed=self._observed.attention if self._observed.active else None,
        )

    def _run_step(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        step: Step,
        logits_to_keep: torch.Tensor | int,
    ) -> torch.Tensor:
        with self._running.running(step):
            output = self._model(
                input_ids=ids,
                position_ids=positions,
                logits_to_keep=logits_to_keep,
                use_cache=True,
                **{self._cache_name: self._cache},
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _make_cache(self, keys: torch.Tensor, values: torch.Tensor) -> KVCache:
        """Make the cache of a layer: keys [tokens, kv_heads, head_dim]."""
        shape = (self.pool.num_blocks, BLOCK_SIZE)
        return KVCache.of(shape, keys, values, torch.int8 if self._int8 else keys.dtype)
