"""Time whole replies of a model in the shape of Llama-2-7B: one sequence, and sixteen together."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from checkpoints import shapes
from models_part import batch_replies, prompts_of
from timing import launch_seconds, measure_bandwidth, synchronize

from gptq_loader_plugin.measure.speed import bytes_read_a_token, peak_memory

if TYPE_CHECKING:
    from record import Record
    from where import Where

    import gptq_loader_plugin as gptq

__all__ = ["TIMES", "run"]

NAME = "Llama-2-7B"
TIMES = 10  # one sequence's tokens a second: the aim for sixteen in one pass
SEQUENCES = (1, 16)
PROMPT, REPLY = 512, 128
TINY_PROMPT, TINY_REPLY = 12, 4
BUFFER = 1 << 30
FEW = 4  # tokens that say how many there is time for
USED = 0.8  # of the time that is left
ROOM = 2 << 30  # bytes for an embedding, activations, and what others hold
SPARE = 20  # seconds that are to be left before replies of more sequences are begun


def run(record: Record, where: Where) -> None:
    """Make the checkpoint, load it as users do, and write replies of two lengths."""
    made = shapes()
    shape = made.SHAPES[NAME]
    if where.tiny:
        shape = replace(shape, hidden=128, inner=256, layers=1, heads=4, kv_heads=4, vocabulary=512)
    folder = where.folder / "checkpoints" / NAME
    began = time.monotonic()
    made.make_checkpoint(folder, shape)
    record.figure("made", seconds=time.monotonic() - began)
    rates = measure_bandwidth(where.device, 1 << 20 if where.tiny else BUFFER)
    bandwidth, launch = max(rates.values()), launch_seconds(where.device)
    began = time.monotonic()
    with where.load(folder, check=False) as model:
        synchronize(where.device)
        size = bytes_read_a_token(model)
        record.figure(
            "loaded",
            seconds=time.monotonic() - began,
            kernels=model.plan.kernels(),
            engine=model.engine is not None,
            bytes_a_token=size,
            peak_bytes=peak_memory(where.device),
            notes=list(model.notes),
            bandwidth=bandwidth,
            launch_seconds=launch,
            tiny=where.tiny,
        )
        for count in SEQUENCES:
            if (why := _why_not(record, where, model, count, size)) is not None:
                record.check(f"{count} sequences", passed=None, detail=why)
                continue
            with record.checking(f"{count} sequences"):
                _time_replies(record, where, model, count, size, bandwidth)
    if not where.tiny:
        shutil.rmtree(folder)


def _why_not(
    record: Record, where: Where, model: gptq.LoadedModel, count: int, size: int
) -> str | None:
    """Say why so many sequences cannot be tried, or None where they can."""
    if where.tiny:
        return None
    needed = size + count * (PROMPT + REPLY) * _position_bytes(model) + ROOM
    if needed > (where.device.memory_bytes or needed):
        return f"they need {needed / 1e9:.1f} GB"
    return "no time was left" if record.left < SPARE else None


def _time_replies(
    record: Record,
    where: Where,
    model: gptq.LoadedModel,
    count: int,
    size: int,
    bandwidth: float,
) -> None:
    prompt, reply = (TINY_PROMPT, TINY_REPLY) if where.tiny else (PROMPT, REPLY)

    def seconds(tokens: int, seed: int) -> float:
        prompts = prompts_of((prompt,) * count, 256, seed)
        began = time.perf_counter()
        batch_replies(model, prompts, tokens, watched=False)
        synchronize(where.device)
        return time.perf_counter() - began

    seconds(3, 0)  # compiles and captures
    first = seconds(1, 1)
    few = max(seconds(1 + FEW, 3) - first, 1e-9) / FEW
    reply = max(FEW, min(reply, int(USED * (record.left - first) / few)))
    whole = seconds(1 + reply, 2)
    step = max(whole - first, 1e-9) / reply
    position = _position_bytes(model)
    kept = count * (prompt + reply / 2) * position
    record.figure(
        "replies",
        sequences=count,
        prompt=prompt,
        reply=reply,
        prompt_tokens_a_second=count * prompt / first,
        tokens_a_second=count / step,
        step_seconds=step,
        share_of_memory=size / step / bandwidth,
        share_of_memory_with_kv=(size + kept) / step / bandwidth,
        position_bytes=position,
        peak_bytes=peak_memory(where.device),
    )


def _position_bytes(model: gptq.LoadedModel) -> int:
    """Return the bytes of keys and values that a position has, in the model's dtype."""
    config = model.model.config
    heads: int = config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads * heads
    element: int = model.model.get_input_embeddings().weight.element_size()  # type: ignore[union-attr]
    return 2 * config.num_hidden_layers * size * element
