"""Several replies at a time are the replies they would be alone."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from altered import CPU_KERNELS, DATA, ONE, plugins

import gptq_loader_plugin as gptq
from gptq_loader_plugin.generation.batch import Batch
from gptq_loader_plugin.generation.generate import Generation

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

    from gptq_loader_plugin.generation.generate import Piece

PROMPTS = [
    "The", "Once upon a time there was a", "A " * 300, "x", "What is the capital of France?" * 9,
    "1 2 3 4 5 6 7 8 9", "She said", "import torch\n", "", "In the beginning",
]  # fmt: skip


@pytest.fixture(scope="module", params=[CPU_KERNELS[0], "reference"])
def model(request: pytest.FixtureRequest) -> Iterator[gptq.LoadedModel]:
    with gptq.load(DATA / ONE, backend=request.param, dtype="float32", plugins=plugins()) as loaded:
        yield loaded


def options(tokens: int, **more: Any) -> gptq.GenerateOptions:
    return gptq.GenerateOptions(**{"temperature": 0, "max_new_tokens": tokens, **more})


def write(
    batch: Batch, coming: Sequence[Callable[[], Generation]]
) -> dict[int, list[Piece | Exception]]:
    """Write replies, one more joining at each step; give each one's pieces by its number."""
    numbers: dict[Generation, int] = {}
    pieces: dict[int, list[Piece | Exception]] = {}
    waiting = list(enumerate(coming))
    while waiting or len(batch):
        if waiting:
            number, begin = waiting.pop(0)
            generation = begin()
            numbers[generation], pieces[number] = number, []
            batch.add(generation)
        for generation, what in batch.step():
            pieces[numbers[generation]].append(what)
    return pieces


def text(pieces: list[Piece | Exception]) -> str:
    return "".join(it.text for it in pieces if not isinstance(it, Exception))


def test_twenty_replies_are_what_they_are_alone(model: gptq.LoadedModel) -> None:
    asked = [(prompt, options(20 + 7 * i)) for i, prompt in enumerate(PROMPTS * 2)]
    alone = [model.generate(prompt or " ", it) for prompt, it in asked]
    begins = [
        lambda prompt=prompt, it=it: model.begin(model.encode(prompt or " "), it)
        for prompt, it in asked
    ]
    together = write(Batch(model), begins)
    for i, expected in enumerate(alone):
        last = together[i][-1]
        assert not isinstance(last, Exception)
        assert text(together[i]) == expected.text
        assert (last.finish, last.tokens) == (expected.finish, expected.tokens)


def test_a_seed_gives_the_same_reply_beside_others(model: gptq.LoadedModel) -> None:
    asked = options(40, temperature=1.0, seed=7, stop=("e",))
    alone = model.generate("She said", asked)
    begins = [
        lambda it=it: model.begin(model.encode("She said"), it)
        for it in (options(50), asked, options(30, temperature=1.0))
    ]
    assert text(write(Batch(model), begins)[1]) == alone.text


def test_one_is_cancelled_and_one_fails_and_the_others_go_on(model: gptq.LoadedModel) -> None:
    class Failing:
        def __call__(self, sequence: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if sequence.shape[1] > 8:
                raise RuntimeError("no more")
            return scores

    cancel = threading.Event()
    expected = model.generate("The", options(30))
    batch = Batch(model)
    going = model.begin(model.encode("The"), options(30))
    ended = model.begin(model.encode("She said"), options(500), cancel=cancel)
    failing = model.begin(model.encode("The"), options(500), processors=[Failing()])  # type: ignore[list-item]
    for it in (going, ended, failing):
        batch.add(it)
    pieces: dict[Generation, list[Piece | Exception]] = {going: [], ended: [], failing: []}
    for count in range(200):
        if count == 5:
            cancel.set()
        for generation, what in batch.step():
            pieces[generation].append(what)
        if not len(batch):
            break
    assert text(pieces[going]) == expected.text
    last = pieces[ended][-1]
    assert not isinstance(last, Exception)
    assert (last.finish, last.tokens) == ("cancelled", 5)
    assert isinstance(pieces[failing][-1], RuntimeError)
    assert not len(batch)


def test_a_long_prompt_does_not_hold_up_the_others(model: gptq.LoadedModel) -> None:
    batch = Batch(model)
    short = model.begin(model.encode("The"), options(100))
    batch.add(short)
    list(batch.step())
    ids = model.encode("A " * 480)
    long = model.begin(ids, options(2))
    batch.add(long)
    steps, given = 0, 0
    while long.pending != [] and len(long.pending) > 8:
        given += sum(it is short for it, _ in batch.step())
        steps += 1
    assert steps >= len(ids) // 256
    assert given >= steps - 1  # pieces of the short one came meanwhile, but for half characters
    batch.close()
    assert short.finished
    assert long.finished


@pytest.mark.parametrize(("seconds", "most"), [(0.05, 8), (0.002, 75), (1e-5, 256)])
def test_a_slow_model_reads_a_prompt_in_short_parts(
    model: gptq.LoadedModel, monkeypatch: pytest.MonkeyPatch, seconds: float, most: int
) -> None:
    """Replies wait for 150 ms at most, or for a few tokens."""
    now, sizes = [0.0], []
    forward = Generation.forward_chunk

    def slow(generation: Generation, max_tokens: int) -> Any:
        if generation is long:
            sizes.append(min(max_tokens, len(generation.pending)))
            now[0] += seconds * sizes[-1]
        return forward(generation, max_tokens)

    model.forget()
    batch, long = Batch(model), model.begin(model.encode("A " * 480), options(2))
    monkeypatch.setattr("gptq_loader_plugin.generation.batch.perf_counter", lambda: now[0])
    monkeypatch.setattr(Generation, "forward_chunk", slow)
    batch.add(model.begin(model.encode("The"), options(300)))
    list(batch.step())
    batch.add(long)
    while len(long.pending) > 8:
        list(batch.step())
    batch.close()
    assert sizes[0] == 8
    assert most * 0.6 < max(sizes) <= most
    assert sum(sizes) >= 470


def test_conversations_side_by_side_read_only_what_is_new(model: gptq.LoadedModel) -> None:
    model.forget()
    model.keep(2)
    try:
        first = [model.encode("One " * 40), model.encode("Two " * 40)]
        write(Batch(model), [lambda ids=ids: model.begin(ids, options(3)) for ids in first])
        for ids in first:
            again = model.begin([*ids, *model.encode(" and more")], options(3))
            assert len(again.pending) < 12
            again.close()
        other = model.begin(model.encode("Three " * 40), options(3))
        assert len(other.pending) >= 40
        other.close()
    finally:
        model.keep(1)
        model.forget()
