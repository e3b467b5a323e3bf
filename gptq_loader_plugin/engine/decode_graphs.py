"""Decode one token of each sequence by a captured graph, one for each number of sequences.

A decoding step launches some hundred kernels, each of which takes the GPU less time than Python
takes to launch it. A CUDA graph launches all of them at once. It reads its inputs from buffers that
stay where they are, and is made for a number of sequences: the next larger of `BUCKETS`, whose last
rows have no sequence. On devices without graphs the same step is called.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.model.experts import watch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Decode = Callable[
        [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
    ]

__all__ = ["BUCKETS", "DecodeGraphs"]

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
FIELDS = 4  # of a sequence, before its blocks: token, position, slot, length
WARM_UP = 2  # calls before a capture: Triton compiles, libraries take their memory

logger = logging.getLogger(__name__)


class DecodeGraphs:
    """The graphs of one model and one pool of blocks.

    Args:
        decode: reads one token of each sequence: tokens, positions and slots, int64 [sequences];
            block tables, int32 [sequences, blocks]; lengths, int32 [sequences]. It returns logits
            [sequences, vocabulary], looks at no value, and writes nothing where a slot is -1.
        model: what it runs; a graph is used while nothing in it was replaced, and nobody watches.
        num_blocks: the blocks of the longest sequence.
    """

    def __init__(self, decode: Decode, model: Any, num_blocks: int) -> None:  # noqa: ANN401
        self._decode, self._model = decode, model
        self._device = model.device
        self._width = FIELDS + num_blocks
        self._captures = self._device.type == "cuda"
        self._watch = watch(model, list(model.modules()))
        self._refused = False
        self._graphs: dict[int, tuple[Any, torch.Tensor]] = {}
        self._pool: Any = None
        pinned = self._captures
        self._host = torch.empty(BUCKETS[-1] * self._width, dtype=torch.int32, pin_memory=pinned)
        self._inputs = torch.empty_like(self._host, device=self._device)
        self._copied = torch.cuda.Event() if self._captures else None

    def run(
        self,
        tokens: Sequence[int] | torch.Tensor,
        positions: Sequence[int],
        slots: Sequence[int],
        blocks: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """Read one token of each sequence; return the logits [sequences, vocabulary].

        They are overwritten by the next call. Tokens may be int64 [sequences] on the device.
        """
        parts = []
        for i in range(0, len(tokens), BUCKETS[-1]):
            some = slice(i, i + BUCKETS[-1])
            logits = self._run_bucket(tokens[some], positions[some], slots[some], blocks[some])
            parts.append(logits if len(tokens) <= BUCKETS[-1] else logits.clone())
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _run_bucket(
        self,
        tokens: Sequence[int] | torch.Tensor,
        positions: Sequence[int],
        slots: Sequence[int],
        blocks: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        count = len(tokens)
        bucket = next(it for it in BUCKETS if it >= count)
        width = self._width if self._captures else FIELDS + max(map(len, blocks))
        if self._copied is not None:
            self._copied.synchronize()  # long done: the last step has read the host's buffer
        known = [0] * count if isinstance(tokens, torch.Tensor) else tokens
        self._write(bucket, width, known, positions, slots, blocks)
        inputs = self._inputs[: bucket * width]
        inputs.copy_(self._host[: bucket * width], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if isinstance(tokens, torch.Tensor):
            inputs.view(bucket, width)[:count, 0].copy_(tokens)
        if not self._captures or self._refused or not self._watch.unchanged():
            return self._call(bucket, width)[:count]
        if bucket not in self._graphs and not self._capture(bucket):
            return self._call(bucket, width)[:count]
        graph, logits = self._graphs[bucket]
        graph.replay()
        return logits[:count]

    def _write(
        self,
        bucket: int,
        width: int,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        blocks: Sequence[Sequence[int]],
    ) -> None:
        """Write the inputs of a step side by side, a row each for every sequence."""
        rows = self._host[: bucket * width].view(bucket, width).numpy()
        rows[:, :FIELDS] = (0, 0, -1, 0)  # of rows without a sequence
        rows[:, FIELDS:] = 0
        for i, own in enumerate(blocks):
            rows[i, :FIELDS] = tokens[i], positions[i], slots[i], positions[i] + 1
            rows[i, FIELDS : FIELDS + len(own)] = own

    def _call(self, bucket: int, width: int) -> torch.Tensor:
        rows = self._inputs[: bucket * width].view(bucket, width)
        tokens, positions, slots = (rows[:, i].long() for i in range(3))
        return self._decode(
            tokens, positions, slots, rows[:, FIELDS:].contiguous(), rows[:, 3].contiguous()
        )

    def _capture(self, bucket: int) -> bool:
        """Capture the step of a bucket; return False where the model does what no graph can."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._call(bucket, self._width)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                logits = self._call(bucket, self._width)
        except RuntimeError as error:
            self._refused = True
            logger.warning(
                "this model's step cannot be captured, and each of its kernels is launched by "
                "itself: %s",
                str(error).partition("\n")[0],
            )
            return False
        self._pool = self._pool or graph.pool()
        self._graphs[bucket] = graph, logits
        return True
