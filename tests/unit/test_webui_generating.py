"""The `generate` that text-generation-webui calls, with a real model behind it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, ONE
from transformers import StoppingCriteria, StoppingCriteriaList
from waiting import eventually, join

import gptq_loader_plugin as gptq
from gptq_loader_extensions.webui.generate import HostGenerate, find_generate

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT = torch.tensor([[380, 11, 12, 13, 14, 15, 16, 17]])


@pytest.fixture
def ours() -> Iterator[HostGenerate]:
    with gptq.load(DATA / ONE, device="cpu", backend="reference") as loaded:
        yield HostGenerate(loaded)


def greedy(ours: HostGenerate, prompt: torch.Tensor = PROMPT, **options: Any) -> list[int]:
    model: Any = ours.loaded.model
    request = {"max_new_tokens": 12, "do_sample": False} | options
    out = model.generate(inputs=prompt, **request)[0]
    return [int(it) for it in out[prompt.shape[1] :]]


def read_of(ours: HostGenerate) -> list[int]:
    """Count the tokens of every forward from here on."""
    counts: list[int] = []
    model: Any = ours.loaded.model.model
    model.register_forward_pre_hook(
        lambda _, __, kwargs: counts.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return counts


def test_it_answers_as_the_model_itself_and_counts(ours: HostGenerate) -> None:
    model: Any = ours.loaded.model
    tokens = greedy(ours)
    assert model.last_prompt_token_count == PROMPT.shape[1]
    assert ours.reply_tokens.tolist() == tokens
    with gptq.load(DATA / ONE, device="cpu", backend="reference") as loaded:
        other: Any = loaded.model
        plain = other.generate(inputs=PROMPT, max_new_tokens=12, do_sample=False)[0]
        assert plain[PROMPT.shape[1] :].tolist() == tokens


def test_a_conversation_is_read_once(ours: HostGenerate) -> None:
    counts = read_of(ours)
    first = greedy(ours)
    assert counts[0] == PROMPT.shape[1]
    turn = torch.cat((PROMPT, torch.tensor([[*first, 21, 22, 23]])), dim=1)
    del counts[:]
    second = greedy(ours, turn)
    assert counts[0] == 4, "the last token of the reply, and three new ones"
    ours.reuse = False
    del counts[:]
    assert greedy(ours, turn) == second, "the same when all is read again"
    assert counts[0] == turn.shape[1]
    ours.reuse = True
    greedy(ours, turn)
    del counts[:]
    assert greedy(ours, turn, use_cache=False) == second
    assert counts[0] == turn.shape[1]


class Gone(Exception):
    pass


class Leaving(StoppingCriteria):
    """A client that goes away after three tokens, which the host signals by raising."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] == PROMPT.shape[1] + 3:
            raise Gone
        return False


def test_a_reply_that_was_left_is_kept_as_far_as_it_came(ours: HostGenerate) -> None:
    whole = greedy(ours)
    ours.reuse = False
    greedy(ours)  # forgets
    ours.reuse = True
    with pytest.raises(Gone):
        greedy(ours, stopping_criteria=StoppingCriteriaList([Leaving()]))
    assert ours.reply_tokens.tolist() == whole[:3]
    counts = read_of(ours)
    assert greedy(ours) == whole
    assert counts[0] == 1


def test_it_ends_at_every_end_token_and_at_none_that_is_banned(ours: HostGenerate) -> None:
    end = ours.loaded.tokenizer.eos_token_id
    tokens = greedy(ours)
    assert end not in tokens
    ours.loaded.model.generation_config.eos_token_id = [end, tokens[4]]  # type: ignore[union-attr]
    assert greedy(ours, eos_token_id=[end]) == tokens[:5]
    banned = greedy(ours, eos_token_id=[end], suppress_tokens=[end])
    assert len(banned) == 12


def test_who_cancels_is_heard_at_the_next_token(ours: HostGenerate) -> None:
    ours.cancel = threading.Event()
    ours.cancel.set()
    assert len(greedy(ours, max_new_tokens=400)) == 1
    ours.cancel = None
    assert len(greedy(ours)) == 12


def test_closing_waits_for_the_reply_that_is_written(ours: HostGenerate) -> None:
    counts = read_of(ours)
    tokens: list[int] = []
    writing = threading.Thread(
        target=lambda: tokens.extend(greedy(ours, max_new_tokens=450, suppress_tokens=[381]))
    )
    writing.start()
    eventually(lambda: len(counts) >= 5, awaited="five steps of the model")
    model: Any = ours.loaded.model
    ours.close()
    join(writing)
    assert 4 <= len(tokens) < 450
    assert find_generate(model) is None
    assert next(model.parameters()).is_meta
    with pytest.raises(gptq.GPTQLoaderError, match="is unloaded"):
        ours(inputs=PROMPT, max_new_tokens=2)
