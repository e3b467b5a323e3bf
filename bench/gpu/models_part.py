"""Hold whole models' replies: a batch to each reply alone, and the device to float32 on the CPU."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from checkpoints import make_family, make_llama
from where import load_reference

import gptq_loader_plugin as gptq
from gptq_loader_plugin.conformance.layers import Case, make_spec
from gptq_loader_plugin.generation.batch import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import torch
    from record import Record
    from where import Where

__all__ = ["batch_replies", "prompts_of", "replies_alone", "run"]

FAMILIES = ("mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt_neox", "llama-yarn")
LENGTHS = (5, 40, 1, 70, 33, 130)  # of prompts, on both sides of windows and tiles
TOKENS = 12
TINY_LENGTHS, TINY_TOKENS = (5, 20, 1), 3
# Logits of two layers in 16 bits against float32, and the same at another number of rows, by the
# norm of what they are off.
OFF_FLOAT32 = 3e-2
OFF_ALONE = 1e-2
SWAPS = 8  # times their error apart, two logits may change places: each is off, and some by more


@dataclass(slots=True)
class Written:
    """A reply.

    Attributes:
        text: its text.
        tokens: its tokens, where it was watched.
        logits: those that each was picked from, float32 [vocabulary].
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def watch(self, token: int, logits: torch.Tensor) -> None:
        """Note a token and its logits."""
        self.tokens.append(token)
        self.logits.append(logits.flatten().float().cpu())


def run(record: Record, where: Where) -> None:
    """Make checkpoints one by one, and write replies with each."""
    for name, make, backend in _models(where):
        if record.left < 0:
            record.check(name, passed=None, detail="no time was left")
            continue
        with record.checking(name):
            check_model(record, where, name, make(), backend=backend)


def _models(where: Where) -> Iterator[tuple[str, Callable[[], Path], str | None]]:
    """List models: a name, what makes the checkpoint, and the kernel that is asked for."""
    folder = where.folder / "checkpoints"
    four = partial(make_llama, folder / "llama-4bit", layers=1 if where.tiny else 2)
    yield "llama 4-bit", four, None
    if where.tiny:
        return
    for kernel in (*where.fused_kernels(make_spec(Case())), None):
        backend = "dense" if kernel is None else kernel.name
        yield f"llama 4-bit by {backend}", four, backend
    for bits, act_order in ((4, True), (3, True), (8, False), (2, False)):
        name = f"llama-{bits}bit" + ("-act" if act_order else "")
        yield name, partial(make_llama, folder / name, bits=bits, act_order=act_order), None
    for family in FAMILIES:
        yield family, partial(make_family, folder / family, family), None


def prompts_of(lengths: Sequence[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Draw prompts."""
    draw = random.Random(seed)  # noqa: S311 - a seeded draw
    return [[draw.randrange(3, vocabulary - 1) for _ in range(length)] for length in lengths]


def replies_alone(
    model: gptq.LoadedModel, prompts: Sequence[Sequence[int]], tokens: int
) -> list[Written]:
    """Write a reply to each prompt, one after the other."""
    replies = []
    for ids in prompts:
        replies.append(reply := Written())
        model.forget()
        options = gptq.GenerateOptions(max_new_tokens=tokens, temperature=0)
        for piece in model.stream_ids(ids, options, watch=reply.watch):
            reply.text += piece.text
    return replies


def batch_replies(
    model: gptq.LoadedModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    *,
    watched: bool,
    joining: int = 0,
) -> list[Written]:
    """Write a reply to each prompt, side by side.

    Args:
        model: writes them.
        prompts: their tokens.
        tokens: of each reply.
        watched: whether someone sees the logits, which an engine may have to bring along.
        joining: after how many steps another reply joins; 0 begins with all.
    """
    model.forget()
    if model.engine is not None:
        model.keep(len(prompts))  # room for as many
    options = gptq.GenerateOptions(max_new_tokens=tokens, temperature=0)
    replies = [Written() for _ in prompts]
    waiting = [
        (model.begin(ids, options, watch=reply.watch if watched else None), reply)
        for ids, reply in zip(prompts, replies, strict=True)
    ]
    batch = Batch(model)
    of: dict[int, Written] = {}
    steps = 0
    while waiting or len(batch):
        while waiting and (not joining or steps % joining == 0):
            generation, reply = waiting.pop(0)
            of[id(generation)] = reply
            batch.add(generation)
            if joining:
                break
        for generation, piece in batch.step():
            if isinstance(piece, Exception):
                raise piece
            of[id(generation)].text += piece.text
        steps += 1
    batch.close()
    return replies


def check_model(
    record: Record, where: Where, name: str, path: Path, *, backend: str | None = None
) -> None:
    """Check one checkpoint by one kernel, or by those that are chosen."""
    lengths, tokens = (TINY_LENGTHS, TINY_TOKENS) if where.tiny else (LENGTHS, TOKENS)
    try:
        model = where.load(path, backend=backend)
    except gptq.NoBackend as error:
        record.check(f"{name}: loads", passed=None, detail=error.message)
        return
    with model:
        prompts = prompts_of(lengths, min(model.vocab_size, 256))
        with load_reference(path) as plain:
            right = replies_alone(plain, prompts, tokens)
        alone = replies_alone(model, prompts, tokens)
        kernels = ", ".join(model.plan.kernels())
        record.figure(
            name,
            kernels=model.plan.kernels(),
            engine=model.engine is not None,
            notes=list(model.notes),
        )
        _compare(record, f"{name} ({kernels}): as float32 on the CPU", alone, right, OFF_FLOAT32)
        together = batch_replies(model, prompts, tokens, watched=True, joining=1)
        name = f"{name}: a batch as each alone"
        worst = _compare(record, name, together, alone, OFF_ALONE)
        unwatched = batch_replies(model, prompts, tokens, watched=False)
        differ = [
            i
            for i, (reply, other) in enumerate(zip(unwatched, alone, strict=True))
            if reply.text != other.text
            and not any(_near(logits, SWAPS * min(worst, OFF_ALONE)) for logits in other.logits)
        ]
        same = sum(it.text == other.text for it, other in zip(unwatched, alone, strict=True))
        record.check(
            f"{name}, unwatched",
            passed=not differ,
            detail=f"{same} of {len(alone)} texts are the same; wrong: {differ}",
        )


def _compare(
    record: Record, name: str, replies: list[Written], right: list[Written], allowed: float
) -> float:
    """Compare replies while their tokens are the same; where they part, two logits must be near.

    Returns:
        How far the worst logits are off.
    """
    worst, compared, parted = 0.0, 0, []
    for i, (reply, expected) in enumerate(zip(replies, right, strict=True)):
        for at, (token, logits) in enumerate(zip(reply.tokens, reply.logits, strict=True)):
            if at >= len(expected.tokens):
                parted.append(f"reply {i} goes on after {at} tokens")
                break
            other = expected.logits[at]
            error = float((logits - other).norm() / other.norm())
            worst = max(worst, error if error == error else float("inf"))  # noqa: PLR0124 - not a number
            compared += 1
            if token != expected.tokens[at]:
                if not _near(other, SWAPS * max(error, 1e-4), token):
                    parted.append(f"reply {i} has another token at {at}")
                break
    passed = worst <= allowed and not parted and compared >= len(right)
    words = f"logits off by {worst:.1e} of {allowed:.0e}, {compared} tokens compared"
    record.check(name, passed=passed, detail="; ".join((words, *parted)))
    return max(worst, 1e-4)


def _near(logits: torch.Tensor, error: float, token: int | None = None) -> bool:
    """Whether the greatest logit is so near another, or a token's, that an error may swap them."""
    best = logits.topk(2).values
    other: Any = best[1] if token is None else logits[token]
    return float(best[0] - other) <= error * float(logits.square().mean().sqrt())
