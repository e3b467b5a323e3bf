"""Guessed tokens change no reply: not a token, not a draw, not what is kept for the next one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, ONE, edit_json, plugins
from altered import copy as copy_checkpoint

import gptq_loader_plugin as gptq
from gptq_loader_kernels.cpu.library import find_library
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.generation import speculation
from gptq_loader_plugin.generation.batch import Batch
from gptq_loader_plugin.generation.speculation import (
    MAX_GUESSES,
    ModelDrafter,
    NgramDrafter,
    Pace,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from gptq_loader_plugin.generation.speculation import Drafter

needs_native = pytest.mark.skipif(find_library() is None, reason="the native library was not built")
PROMPTS = ["She said", "one two one two one two one", "x" * 30]


class Wrong:
    """Guesses at random."""

    def __init__(self) -> None:
        self.draw = random.Random(5)

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        del tokens
        return [self.draw.randrange(300) for _ in range(count)]


@pytest.fixture(scope="module")
def model() -> Iterator[gptq.LoadedModel]:
    with gptq.load(DATA / ONE, device="cpu", dtype="float32", plugins=plugins()) as loaded:
        yield loaded


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guess as many tokens as there can be in every step, whatever that costs."""
    monkeypatch.setattr(Pace, "choose", lambda self: MAX_GUESSES)


def guessing(
    model: gptq.LoadedModel, drafter: Callable[[], Drafter | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_drafter", drafter)


def drafters(model: gptq.LoadedModel) -> dict[str, Callable[[], Drafter]]:
    return {
        "ngram": NgramDrafter, "wrong": Wrong, "right": lambda: ModelDrafter(model.model),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["ngram", "wrong", "right"])
@pytest.mark.parametrize(
    "more",
    [
        {"temperature": 0}, {"temperature": 0, "stop": ("e",)}, {"temperature": 0.9, "seed": 7},
        {"temperature": 1.3, "seed": 1, "top_k": 0, "min_p": 0.01},
        {"temperature": 0, "repetition_penalty": 1.3},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.usefixtures("always")
def test_replies_are_those_without_guesses(
    model: gptq.LoadedModel, name: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for prompt in PROMPTS:
        for tokens in (1, 4, 37):
            options = gptq.GenerateOptions(max_new_tokens=tokens, **more)
            seen: list[list[tuple[int, int]]] = []
            replies = []
            for drafter in (lambda: None, drafters(model)[name]):
                guessing(model, drafter, monkeypatch)
                model.forget()
                picked: list[tuple[int, int]] = []
                pieces = list(
                    model.stream_ids(
                        model.encode(prompt), options,
                        watch=lambda token, logits, to=picked: to.append(
                            (token, int(logits.argmax()))
                        ),
                    )
                )  # fmt: skip
                replies.append(
                    ("".join(it.text for it in pieces), pieces[-1].tokens, pieces[-1].finish)
                )
                seen.append(picked)
            assert replies[0] == replies[1]
            assert seen[0] == seen[1]


@pytest.mark.usefixtures("always")
def test_two_hundred_draws_are_the_same(
    model: gptq.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what is drawn has the same distribution, whatever is guessed."""
    for seed in range(200):
        options = gptq.GenerateOptions(max_new_tokens=6, temperature=1.5, top_k=0, seed=seed)
        guessing(model, lambda: None, monkeypatch)
        expected = model.generate("She said", options).text
        guessing(model, drafters(model)[("right", "wrong")[seed % 2]], monkeypatch)
        assert model.generate("She said", options).text == expected


@pytest.mark.usefixtures("always")
def test_right_guesses_save_steps_and_what_is_kept_is_right(
    model: gptq.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = gptq.GenerateOptions(temperature=0, max_new_tokens=40)
    guessing(model, lambda: None, monkeypatch)
    expected = model.generate("She said", options).text
    after = model.generate("She said" + expected, options).text
    for name, fewer in (("right", True), ("wrong", False)):
        guessing(model, drafters(model)[name], monkeypatch)
        model.forget()
        generation = model.begin(model.encode("She said"), options)
        steps = 0
        with torch.inference_mode():
            while not generation.finished:
                generation.sample(generation.forward_pending())
                steps += 1
        generation.close()
        assert (steps <= 10) == fewer
        # The next prompt begins with what this reply has kept.
        assert model.generate("She said" + expected, options).text == after


@needs_native
@pytest.mark.usefixtures("always")
def test_a_reply_beside_others_guesses_nothing_and_goes_on_alone(
    model: gptq.LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [gptq.GenerateOptions(temperature=0, max_new_tokens=it) for it in (30, 9)]
    guessing(model, lambda: None, monkeypatch)
    expected = [model.generate(PROMPTS[i], options[i]).text for i in range(2)]
    guessing(model, drafters(model)["right"], monkeypatch)
    coming = [model.begin(model.encode(PROMPTS[i]), options[i]) for i in range(2)]
    batch, texts = Batch(model), {id(it): "" for it in coming}
    batch.add(coming[0])
    for step in range(100):
        if step == 3:
            batch.add(coming[1])
        for generation, what in batch.step():
            assert not isinstance(what, Exception)
            texts[id(generation)] += what.text
        if not len(batch):
            break
    assert [texts[id(it)] for it in coming] == expected


def test_what_followed_the_same_words_is_guessed() -> None:
    drafter, tokens = NgramDrafter(), [1, 2, 3, 4, 5, 9, 2, 3]
    assert drafter.propose(tokens, 3) == [4, 5, 9]
    tokens += [4, 7, 2, 3]
    assert drafter.propose(tokens, 4) == [4, 7, 2, 3]  # the last time counts
    assert drafter.propose([*tokens, 8], 4) == []


def test_guesses_stop_where_they_cost_more_than_they_bring_and_come_back() -> None:
    pace, asked = Pace(), []
    for _ in range(600):
        asked.append(pace.choose())
        pace.note(asked[-1], 0, 1.0 + 0.2 * asked[-1])
    assert asked[0] > 0
    assert asked[50:].count(0) > 0.9 * len(asked[50:])
    assert any(asked[300:])  # they are tried again
    for _ in range(100):  # and where they are right now, they stay
        count = pace.choose()
        pace.note(count, count, 1.0 + 0.2 * count)
    assert pace.choose() > 0
    cheap = Pace()
    for _ in range(30):
        count = cheap.choose()
        cheap.note(count, count, 1.0 + 0.1 * count)
    assert cheap.choose() == MAX_GUESSES


def test_a_draft_of_the_same_tokens_is_loaded_and_closed() -> None:
    with gptq.load(DATA / ONE, device="cpu", draft=DATA / ONE, plugins=plugins()) as model:
        draft = model.draft
        assert isinstance(draft, gptq.LoadedModel)
        assert draft.draft is None  # it guesses for another
        assert model.generate("She said").tokens
    assert draft.model.device.type == "meta"


def test_a_draft_of_other_tokens_is_refused(tmp_path: Path) -> None:
    other = copy_checkpoint(ONE, tmp_path / "other")

    def rename(config: dict[str, Any]) -> None:
        vocabulary = config["model"]["vocab"]
        first = next(iter(vocabulary))
        vocabulary[first + "_"] = vocabulary.pop(first)

    edit_json(other / "tokenizer.json", rename)
    with pytest.raises(OptionInvalid, match="has other tokens"):
        gptq.load(DATA / ONE, device="cpu", draft=other, plugins=plugins())


@needs_native
def test_guesses_are_made_where_they_are_exact_or_asked_for() -> None:
    for options, guesses in (
        ({}, True),
        ({"draft": "none"}, False),
        ({"backend": "reference"}, False),  # whose product of several rows is summed otherwise
        ({"backend": "reference", "draft": "ngram"}, True),
    ):
        with gptq.load(DATA / ONE, device="cpu", **options, plugins=plugins()) as model:
            assert isinstance(model._drafter(), NgramDrafter) == guesses, options
            assert any("in fewer steps" in note for note in model.notes) == guesses
            assert model.generate("She said").tokens
    assert speculation.MAX_GUESSES < 8  # of the native step, the last token among them
