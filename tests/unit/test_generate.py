"""Replies: streamed without half characters, stopped where they should be, sampled as asked."""

from __future__ import annotations

import threading
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, ONE, plugins
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import pipeline

import gptq_loader_plugin as gptq
from gptq_loader_plugin.generation.generate import Generation, generate_pieces
from gptq_loader_plugin.generation.text_stream import TextStream

if TYPE_CHECKING:
    from collections.abc import Iterator

GREEDY = {"temperature": 0, "max_new_tokens": 24}
ASK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def model() -> Iterator[gptq.LoadedModel]:
    with gptq.load(DATA / ONE, device="cpu", backend="reference", plugins=plugins()) as loaded:
        yield loaded


def options(**fields: Any) -> gptq.GenerateOptions:
    return gptq.GenerateOptions.parse({**GREEDY, **fields})


@cache
def tiny() -> gptq.LoadedModel:
    return gptq.load(DATA / ONE, device="cpu", plugins=plugins())


class Scripted:
    """A model that says what it is told, one token after the other."""

    device = torch.device("cpu")
    config: Any = None

    def __init__(self, tokens: list[int], config: Any, vocabulary: int) -> None:
        self.tokens, self.config, self.vocabulary = list(tokens), config, vocabulary

    def forward(self, **_: object) -> Any:
        logits = torch.zeros(1, 1, self.vocabulary)
        logits[0, 0, self.tokens.pop(0)] = 10.0
        return type("Output", (), {"logits": logits})

    __call__ = forward

    def get_output_embeddings(self) -> None:
        """Have none."""


def say(model: gptq.LoadedModel, text: str, **more: Any) -> list[gptq.Piece]:
    """Stream a text as if the model had written it."""
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    end = int(model.tokenizer.eos_token_id)
    scripted = Scripted([*ids, end], model.model.config, model.model.config.vocab_size)
    arguments: dict[str, Any] = {
        "max_new_tokens": 1000, "stop": (), "stop_ids": frozenset({end}), **more,
    }  # fmt: skip
    return list(
        generate_pieces(
            lambda: Generation(scripted, model.tokenizer, [1], options(), **arguments)  # type: ignore[arg-type]
        )
    )


@given(text=st.text(min_size=1, max_size=30))
@settings(deadline=None, max_examples=60)
def test_pieces_are_the_text_and_never_half_a_character(text: str) -> None:
    text = text.replace("<", "")  # no control tokens
    pieces = say(tiny(), text)
    assert "".join(it.text for it in pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in it.text for it in pieces)
    assert pieces[-1].finish == "stop"


def test_characters_come_as_soon_as_they_are_whole(model: gptq.LoadedModel) -> None:
    pieces = say(model, "aé漢😀b")
    assert [it.text for it in pieces if it.text] == ["a", "é", "漢", "😀", "b"]
    assert len(pieces) < pieces[-1].tokens, "the bytes of a character came without a piece"


@pytest.mark.parametrize("stop", ["### Instruction:", "\nUSER:", "END", "DD"])
def test_a_stop_text_across_tokens_ends_the_reply_and_is_not_shown(
    model: gptq.LoadedModel, stop: str
) -> None:
    pieces = say(model, f"Some text, E, # and {stop} and more", stop=(stop,))
    assert "".join(it.text for it in pieces) == "Some text, E, # and "
    assert pieces[-1].finish == "stop"
    # what looked like its beginning is given once it is clear that it is not
    whole = say(model, f"A {stop[:-1]}", stop=(stop,))
    assert "".join(it.text for it in whole) == f"A {stop[:-1]}"


def test_the_first_of_several_stop_texts_counts(model: gptq.LoadedModel) -> None:
    pieces = say(model, "one two three", stop=("three", "two", "wo"))
    assert pieces[-1].stop_text == "two"
    assert "".join(it.text for it in pieces) == "one "


def test_special_tokens_are_never_shown(model: gptq.LoadedModel) -> None:
    stream = TextStream(model.tokenizer, ())
    ids = model.tokenizer("a<|im_start|>b<s>c", add_special_tokens=False)["input_ids"]
    assert "".join(stream.add(it) for it in ids) + stream.rest() == "abc"


def test_greedy_is_transformers_greedy(model: gptq.LoadedModel) -> None:
    prompt = "The capital of France"
    reply = model.generate(prompt, options())
    ids = model.tokenizer(prompt, return_tensors="pt")
    whole = model.model.generate(**ids, do_sample=False, max_new_tokens=24)
    new = whole[0, ids["input_ids"].shape[1] :]
    text = model.tokenizer.decode(new, skip_special_tokens=True)
    assert reply.text == text.rstrip("\ufffd")
    assert reply.prompt_tokens == ids["input_ids"].shape[1]


def test_a_penalty_and_a_preset_are_transformers_own(model: gptq.LoadedModel) -> None:
    """The preset of the cards of 2023: 0.7, 0.95, 40, 512, 1.1."""
    preset = gptq.GenerateOptions()
    assert (preset.temperature, preset.top_p, preset.top_k, preset.max_new_tokens) == (
        0.7, 0.95, 40, 512,
    )  # fmt: skip
    prompt = "The the the the"
    ids = model.tokenizer(prompt, return_tensors="pt")
    whole = model.model.generate(**ids, do_sample=False, max_new_tokens=24, repetition_penalty=1.1)
    text = model.tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.generate(prompt, options(repetition_penalty=1.1)).text == text.rstrip("\ufffd")
    assert (
        model.generate(prompt, options()).text
        != model.generate(prompt, options(repetition_penalty=1.5)).text
    )


def test_a_seed_makes_sampling_repeatable(model: gptq.LoadedModel) -> None:
    def text(seed: int) -> str:
        return model.generate("The", options(temperature=1.5, seed=seed)).text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(6)}) > 1


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_narrow_sampling_is_greedy(model: gptq.LoadedModel, narrow: dict[str, Any]) -> None:
    wide = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
    found = model.generate("The", options(**{**wide, **narrow}))
    assert found.text == model.generate("The", options()).text


def test_a_long_reply_is_cut_at_the_length_and_at_the_context(model: gptq.LoadedModel) -> None:
    reply = model.generate("Hello there", options(max_new_tokens=5))
    assert (reply.tokens, reply.finish) == (5, "length") or reply.finish == "stop"
    near = "a" * (model.context - 4)
    ids = model.tokenizer(near)["input_ids"]
    reply = model.generate(near, options(max_new_tokens=500))
    assert len(ids) + reply.tokens <= model.context


def test_cancelling_ends_a_reply_between_two_tokens(model: gptq.LoadedModel) -> None:
    cancel = threading.Event()
    pieces = model.stream("Hello", options(max_new_tokens=200), cancel=cancel)
    next(pieces)
    cancel.set()
    rest = list(pieces)
    assert [it.finish for it in rest] == ["cancelled"]


def test_a_generator_that_is_left_does_no_more_work(model: gptq.LoadedModel) -> None:
    calls: list[int] = []
    handle = model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    pieces = model.chat(ASK, options(max_new_tokens=200))
    next(pieces)
    pieces.close()
    count = len(calls)
    handle.remove()
    assert count < 10


def test_a_prompt_that_does_not_fit_is_an_error(model: gptq.LoadedModel) -> None:
    long = "word " * 600
    for ask in (
        lambda: model.generate(long),
        lambda: model.stream(long),
        lambda: model.chat([{"role": "user", "content": long}]),
        lambda: model.chat([{"role": "user", "content": long}], when_too_long="drop-oldest"),
    ):
        with pytest.raises(gptq.PromptTooLong) as caught:
            ask()
        assert (caught.value.context, caught.value.tokens > 512) == (512, True)
    with pytest.raises(gptq.EmptyPrompt, match="empty"):
        model.check_fits([])


def test_the_oldest_turns_are_left_out_where_asked_and_said(model: gptq.LoadedModel) -> None:
    system = {"role": "system", "content": "Keep me."}
    turns = [
        {"role": role, "content": f"{i} " + "word " * 25}
        for i, role in enumerate(["user", "assistant"] * 6)
    ]
    messages = [system, *turns, {"role": "user", "content": "And now?"}]
    with pytest.raises(gptq.PromptTooLong):
        model.chat(messages)
    ids, warning = model.encode_chat(messages, when_too_long="drop-oldest")
    text = model.tokenizer.decode(ids)
    assert len(ids) < model.context
    assert "Keep me." in text
    assert "And now?" in text
    assert "user\n0 " not in text
    assert "its oldest" in warning
    first, *others = model.chat(messages, options(max_new_tokens=3), when_too_long="drop-oldest")
    assert first.warning == warning
    assert all(not it.warning for it in others)


def test_chat_stops_at_the_end_token(model: gptq.LoadedModel) -> None:
    assert model.template.stop == ("<|im_end|>",)
    assert 381 in model.end_ids(model.template.stop)


def test_a_pipeline_works_too(model: gptq.LoadedModel) -> None:
    pipe = pipeline("text-generation", model=model.model, tokenizer=model.tokenizer)
    pipe.model.generation_config.max_length = None
    made = pipe("Hello", max_new_tokens=4, do_sample=False)
    assert made[0]["generated_text"].startswith("Hello")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -1, "temperature"),
        ("top_p", 0, "top_p"),
        ("max_new_tokens", 0, "max_new_tokens"),
        ("stop", ("",), "stop"),
        ("temprature", 1, "temprature"),
    ],
)
def test_a_wrong_option_is_said(field: str, value: object, words: str) -> None:
    with pytest.raises(gptq.OptionInvalid, match=words) as caught:
        gptq.GenerateOptions.parse({field: value})
    assert "max_new_tokens" in caught.value.hint


def test_a_closed_model_says_so() -> None:
    model = gptq.load(DATA / ONE, device="cpu", plugins=plugins())
    model.close()
    model.close()
    with pytest.raises(gptq.GPTQLoaderError, match="closed"):
        model.generate("a")


def test_a_shorter_context_may_be_asked_for() -> None:
    with gptq.load(DATA / ONE, device="cpu", context=64, plugins=plugins()) as model:
        assert model.context == 64
        with pytest.raises(gptq.PromptTooLong):
            model.generate("word " * 64)
    with pytest.raises(gptq.OptionInvalid, match="2 to 512"):
        gptq.load(DATA / ONE, device="cpu", context=4096, plugins=plugins())
