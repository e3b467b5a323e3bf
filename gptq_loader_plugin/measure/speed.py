"""Measure how fast a loaded model reads and writes, and how near memory's speed that is."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.generation.batch import Batch
from gptq_loader_plugin.generation.generate import Generation, generate_pieces
from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.kernel import Meter, TopLogitsHead

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = [
    "DEPTH",
    "Rates",
    "Speed",
    "measure_speed",
    "peak_memory",
    "prompt_seconds",
    "reply_seconds",
]

DEPTH = 16  # tokens of the prompt before a measured reply
MEMORY_BYTES = 1 << 30  # more than any cache holds, so that reading it is reading memory


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates of several rounds: tokens a second, or bytes."""

    median: float
    best: float

    @classmethod
    def of(cls, rates: list[float]) -> Rates:
        """Sum up rounds."""
        return cls(statistics.median(rates), max(rates))


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a model is.

    Attributes:
        prompt: tokens a second of reading a prompt.
        reply: tokens a second of a greedy reply, its first token left out.
        token_bytes: the weights read for each token of a reply.
        peak_bytes: the most that was held up to then, a prompt and a reply included, where known.
        memory: bytes a second of reading the device's memory, or None where no kernel measures it.
        again: the same of reading `token_bytes` again and again, which a cache may serve.
    """

    prompt: Rates
    reply: Rates
    token_bytes: int
    peak_bytes: int | None
    memory: Rates | None
    again: Rates | None

    @property
    def weight_rate(self) -> float:
        """Bytes of weights read a second while a reply is written."""
        return self.reply.median * self.token_bytes


def measure_speed(
    model: LoadedModel,
    *,
    prompt: int,
    tokens: int,
    rounds: int,
    depth: int = DEPTH,
    progress: Callable[[str], None] = lambda _: None,
) -> Speed:
    """Measure by turns, `rounds` times: memory, a prompt, a reply.

    Args:
        model: the loaded model.
        prompt: the prompt's length in tokens.
        tokens: the reply's length in tokens.
        rounds: how often.
        depth: tokens of the prompt before the reply.
        progress: hears in words what comes next.

    Raises:
        OptionInvalid: the prompt or the reply does not fit the context, or a number is below 1.
    """
    if min(prompt, tokens, rounds, depth) < 1:
        raise OptionInvalid("a length or a number of rounds is below 1", hint="ask for 1 or more")
    if (longest := max(prompt, depth + tokens) + 1) > model.context:
        raise OptionInvalid(
            f"{longest:,} tokens are needed, and the context is {model.context:,}",
            hint="measure a shorter prompt, or a reply that is shorter or begins earlier",
        )
    progress("warming up")
    size = bytes_read_a_token(model)
    prompt_seconds(model, prompt)
    reply_seconds(model, min(tokens, 8), depth)
    peak = peak_memory(model.plan.device)  # before memory is measured, which takes some
    rates: dict[str, list[float]] = {"prompt": [], "reply": [], "memory": [], "again": []}
    for count in range(1, rounds + 1):
        progress(f"round {count} of {rounds}: memory")
        rates["memory"] += _bandwidth(model, MEMORY_BYTES)
        rates["again"] += _bandwidth(model, min(size, MEMORY_BYTES))
        progress(f"round {count} of {rounds}: a prompt of {prompt} tokens")
        rates["prompt"].append(prompt / prompt_seconds(model, prompt))
        progress(f"round {count} of {rounds}: a reply of {tokens} tokens")
        rates["reply"].append(tokens / reply_seconds(model, tokens, depth))
    return Speed(
        prompt=Rates.of(rates["prompt"]),
        reply=Rates.of(rates["reply"]),
        token_bytes=size,
        peak_bytes=peak,
        memory=Rates.of(rates["memory"]) if rates["memory"] else None,
        again=Rates.of(rates["again"]) if rates["again"] else None,
    )


def prompt_seconds(model: LoadedModel, tokens: int) -> float:
    """Time reading a prompt of so many tokens, up to the logits after it."""
    began = time.perf_counter()
    return _run(model, tokens, 1)[0] - began


def reply_seconds(model: LoadedModel, tokens: int, depth: int = DEPTH) -> float:
    """Time so many tokens of a greedy reply, each from the token before it to its own logits.

    `depth` is how many tokens of a prompt come before it.
    """
    times = _run(model, depth, tokens + 1)
    return times[-1] - times[0]


def bytes_read_a_token(model: LoadedModel) -> int:
    """Count the weights of one token of a reply: all but an embedding, of which one row is read.

    Every expert of a mixture is counted; of a head that gives its greatest logits alone, what it
    reads to find them.
    """
    module = model.model
    sizes: dict[int, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        sizes.setdefault(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    head: Any = module.get_output_embeddings()
    table: int = cast("Any", module.get_input_embeddings()).weight.data_ptr()
    weight: torch.Tensor | None = getattr(head, "weight", None)
    read = 0 if weight is None else weight.data_ptr()
    if isinstance(head, TopLogitsHead):
        sizes.pop(read, None)
        read, sizes[0] = 0, head.extra_bytes
    if read != table:
        sizes.pop(table, None)
    return sum(sizes.values())


def peak_memory(device: Device | None = None) -> int | None:
    """Return the peak bytes this process has held: a GPU's where `device` is one, else memory."""
    if device is not None and device.type in ("cuda", "rocm"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class _Clock(threading.Event):
    """Stands in for a cancellation, which is asked about once a token, and notes the time."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def is_set(self) -> bool:
        """Note the time; never cancel."""
        self.times.append(time.perf_counter())
        return False


def _run(model: LoadedModel, prompt: int, tokens: int) -> list[float]:
    """Write a reply that nothing ends early; return the time at which each token was known."""
    clock = _Clock()
    vocabulary = model.vocab_size

    def begin(cancel: threading.Event | None = None) -> Generation:
        return Generation(
            model.model,
            model.tokenizer,
            [i % vocabulary for i in range(100, 100 + prompt)],
            GenerateOptions(temperature=0),
            max_new_tokens=tokens,
            stop=(),
            stop_ids=frozenset(),
            engine=model.engine,
            batcher=model.batcher,
            cancel=cancel,
        )

    if model.engine is None:
        for _ in generate_pieces(lambda: begin(clock)):
            pass
        return clock.times
    model.forget()  # a prompt that begins as one before is not read again
    times: list[float] = []
    batch, generation = Batch(model), begin()
    batch.add(generation)
    while len(batch):
        for _ in batch.step():
            pass
        times += [time.perf_counter()] * (generation.num_tokens - len(times))
    return times


def _bandwidth(model: LoadedModel, size: int) -> list[float]:
    """Have a kernel in use measure memory: bytes a second, or nothing where none can."""
    kernels = {choice.kernel.name: choice.kernel for choice in model.plan.choices}
    for kernel in kernels.values():
        if isinstance(kernel, Meter):
            rate = kernel.read_bandwidth(size, model.plan.device)
            return [] if rate is None else [rate]
    return []
