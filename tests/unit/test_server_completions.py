"""POST /v1/completions, over a real connection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import ONE
from served import COMPLETE, Running, load, running

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("served"), names=(ONE,)) as it:
        yield it


@pytest.fixture(scope="module")
def model(served: Running) -> Iterator[gptq.LoadedModel]:
    assert served.server.settings.models_dir is not None
    with load(served.server.settings.models_dir / ONE) as it:
        yield it


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 1.1, "seed": 5},
        {"temperature": 0, "stop": "e"},
        {"temperature": 0.9, "seed": 6, "top_k": 0, "top_p": 1.0},
    ],
)
def test_a_completion_is_what_the_model_says_alone(
    served: Running, model: gptq.LoadedModel, options: dict[str, Any]
) -> None:
    alone = model.generate("Once upon", gptq.GenerateOptions(max_new_tokens=40, **options))
    body = {"prompt": "Once upon", "max_tokens": 40, **options}
    answer = served.post(COMPLETE, **body).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (alone.text, alone.finish)
    assert answer["usage"] == {
        "prompt_tokens": alone.prompt_tokens,
        "completion_tokens": alone.tokens,
        "total_tokens": alone.prompt_tokens + alone.tokens,
    }
    *chunks, done = served.events(COMPLETE, **body)
    assert done == "[DONE]"
    assert {it["object"] for it in chunks} == {"text_completion"}
    assert "".join(it["choices"][0]["text"] for it in chunks) == alone.text
    assert chunks[-1]["choices"][0]["finish_reason"] == alone.finish


def test_prompts_in_every_form_and_several_replies(served: Running) -> None:
    body: dict[str, Any] = {"max_tokens": 6, "temperature": 0}
    ids = served.post("/v1/internal/encode", text="Hello there").json()["tokens"]
    single = served.post(COMPLETE, prompt="Hello there", **body).json()
    as_ids = served.post(COMPLETE, prompt=ids, **body).json()
    assert as_ids["choices"] == single["choices"]
    several = served.post(COMPLETE, prompt=["Hello there", "I am"], n=2, **body).json()
    texts = [it["text"] for it in several["choices"]]
    assert [it["index"] for it in several["choices"]] == [0, 1, 2, 3]
    assert texts[0] == texts[1] == single["choices"][0]["text"]
    assert texts[2] == texts[3] != texts[0]
    lists = served.post(COMPLETE, prompt=[ids, ids], **body).json()
    assert [it["text"] for it in lists["choices"]] == texts[:2]
    assert lists["usage"]["prompt_tokens"] == 2 * len(ids)


def test_an_echo_with_probabilities_scores_the_prompt(
    served: Running, model: gptq.LoadedModel
) -> None:
    text = "Hello there, all of you"
    answer = served.post(COMPLETE, prompt=text, max_tokens=0, echo=True, logprobs=2).json()
    (choice,) = answer["choices"]
    assert choice["text"] == text
    scored = choice["logprobs"]
    assert "".join(scored["tokens"]) == text
    assert scored["text_offset"][0] == 0
    assert scored["token_logprobs"][0] is None
    ids = torch.tensor([model.encode(text)])
    with torch.inference_mode():
        logprobs = model.model(ids).logits[0].float().log_softmax(-1)
    right = [float(logprobs[i, token]) for i, token in enumerate(ids[0, 1:].tolist())]
    assert scored["token_logprobs"][1:] == pytest.approx(right, abs=0.05)
    for token, top in zip(scored["tokens"][1:], scored["top_logprobs"][1:], strict=True):
        assert len(top) <= 3
        assert token in top, "the token itself is always there, as in OpenAI's"
    longer = served.post(COMPLETE, prompt=text, max_tokens=3, echo=True, logprobs=0, temperature=0)
    (choice,) = longer.json()["choices"]
    assert choice["text"].startswith(text)
    assert len(choice["logprobs"]["tokens"]) == len(right) + 1 + 3
    assert choice["logprobs"]["top_logprobs"] is None


def test_a_streams_probabilities_are_those_of_the_whole(served: Running) -> None:
    body = {"prompt": "Hello", "max_tokens": 12, "temperature": 0, "logprobs": 1}
    whole = served.post(COMPLETE, **body).json()["choices"][0]["logprobs"]
    chunks = [it["choices"][0]["logprobs"] for it in served.events(COMPLETE, **body)[:-1]]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [it for chunk in chunks for it in chunk[name]] == whole[name]


def test_sixteen_tokens_where_none_are_asked_for(served: Running) -> None:
    answer = served.post(COMPLETE, prompt="Hello", temperature=0).json()
    assert answer["usage"]["completion_tokens"] == 16


def test_a_prompt_is_cut_only_where_the_client_says_how(served: Running) -> None:
    long = "word " * 600
    refused = served.post(COMPLETE, prompt=long)
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    cut = served.post(COMPLETE, prompt=long, truncation_length=128, max_tokens=8)
    assert cut.status_code == 200
    assert cut.json()["usage"]["prompt_tokens"] == 120


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": []},
        {"prompt": None},
        {"prompt": [True]},
        {"prompt": [-1]},
        {"prompt": [5000]},
        {"prompt": [["a"]]},
        {"prompt": {"a": 1}},
        {"prompt": "x", "logprobs": True},
        {"prompt": "x", "echo": 1},
        {"prompt": ["x"] * 30, "n": 16},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "best_of": 4},
        {},
    ],
)
def test_a_malformed_request_is_refused(served: Running, wrong: dict[str, Any]) -> None:
    answer = served.post(COMPLETE, **wrong)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
