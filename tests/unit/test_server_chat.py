"""POST /v1/chat/completions, over a real connection."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE
from served import CHAT, OTHER, Running, load, running

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from collections.abc import Iterator

ASK = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("served")) as it:
        yield it


@pytest.fixture(scope="module")
def model(served: Running) -> Iterator[gptq.LoadedModel]:
    """The same model by itself, not through the server."""
    assert served.server.settings.models_dir is not None
    with load(served.server.settings.models_dir / ONE) as it:
        yield it


def alone(model: gptq.LoadedModel, **options: Any) -> tuple[str, int, str | None]:
    pieces = list(model.chat(ASK, gptq.GenerateOptions(**options)))
    return "".join(it.text for it in pieces), pieces[-1].tokens, pieces[-1].finish


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0, "max_new_tokens": 40},
        {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 7, "max_new_tokens": 40},
        {"temperature": 0.8, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 8},
        {"temperature": 0, "max_new_tokens": 40, "stop": ("a",)},
    ],
)
def test_a_reply_is_what_the_model_says_alone(
    served: Running, model: gptq.LoadedModel, options: dict[str, Any]
) -> None:
    text, tokens, finish = alone(model, **{"max_new_tokens": 60, **options})
    body = {
        "messages": ASK,
        "model": ONE,
        "max_tokens": 60,
        **{name: it for name, it in options.items() if name != "max_new_tokens"},
    }
    if "max_new_tokens" in options:
        body["max_tokens"] = options["max_new_tokens"]
    if "stop" in options:
        body["stop"] = list(options["stop"])
    answer = served.post(CHAT, **body).json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == finish
    assert answer["usage"]["completion_tokens"] == tokens
    assert answer["usage"]["prompt_tokens"] == len(model.encode_chat(ASK)[0])
    assert answer["object"] == "chat.completion"
    assert answer["model"] == ONE

    events = served.events(CHAT, **body)
    assert events[-1] == "[DONE]"
    deltas = [it["choices"][0]["delta"] for it in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(it.get("content", "") for it in deltas) == text
    assert events[-2]["choices"][0]["finish_reason"] == finish


def test_a_stream_has_the_shape_that_clients_read(served: Running) -> None:
    events = served.events(
        CHAT, messages=ASK, max_tokens=5, temperature=0, stream_options={"include_usage": True}
    )
    *chunks, last, done = events
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert len({it["id"] for it in events[:-1]}) == 1
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["usage"] is None
        assert [it["finish_reason"] for it in chunk["choices"][:-1]] == []
    assert [it["choices"][0]["finish_reason"] for it in chunks][-1] == "length"


def test_several_replies_have_seeds_of_their_own(served: Running) -> None:
    body = {"messages": ASK, "max_tokens": 12, "temperature": 1.5, "seed": 3}
    three = [it["message"]["content"] for it in served.post(CHAT, **body, n=3).json()["choices"]]
    assert len(set(three)) == 3
    for i, text in enumerate(three):
        single = served.post(CHAT, **{**body, "seed": 3 + i}).json()
        assert single["choices"][0]["message"]["content"] == text
    chunks = served.events(CHAT, **body, n=3)[:-1]
    for i in range(3):
        own = [it["choices"][0] for it in chunks if it["choices"][0]["index"] == i]
        assert "".join(it["delta"].get("content", "") for it in own) == three[i]
        assert own[-1]["finish_reason"] == "length"


def test_logprobs_are_those_of_the_text(served: Running) -> None:
    body = {"messages": ASK, "max_tokens": 20, "temperature": 0, "logprobs": True}
    whole = served.post(CHAT, **body, top_logprobs=3).json()["choices"][0]
    content = whole["logprobs"]["content"]
    assert len(content) == 20
    raw = b"".join(bytes(it["bytes"]) for it in content)
    assert raw.decode(errors="replace").startswith(whole["message"]["content"][:12])
    for token in content:
        assert token["logprob"] <= 0
        assert token["top_logprobs"][0]["logprob"] == pytest.approx(token["logprob"])
        assert len(token["top_logprobs"]) == 3
    chunks = served.events(CHAT, **body, top_logprobs=3)[:-1]
    streamed = [
        token
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for token in chunk["choices"][0]["logprobs"]["content"]
    ]
    assert streamed == content


def test_logprobs_of_a_stopped_reply_leave_the_stop_out(served: Running) -> None:
    body = {"messages": ASK, "max_tokens": 40, "temperature": 0, "logprobs": True}
    text = served.post(CHAT, **body).json()["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    cut = served.post(CHAT, **body, stop=stop).json()["choices"][0]
    assert cut["message"]["content"] == text[: text.index(stop)]
    reported = b"".join(bytes(it["bytes"]) for it in cut["logprobs"]["content"])
    assert stop.encode() not in reported


def test_a_schema_is_followed(served: Running) -> None:
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}, "kind": {"enum": ["cat", "dog"]}},
        "required": ["n", "kind"],
        "additionalProperties": False,
    }
    response_format = {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}
    answer = served.chat(response_format=response_format, max_tokens=200, seed=1, n=3).json()
    for choice in answer["choices"]:
        if choice["finish_reason"] == "stop":
            reply = json.loads(choice["message"]["content"])
            assert isinstance(reply["n"], int)
            assert reply["kind"] in ("cat", "dog")
    assert any(it["finish_reason"] == "stop" for it in answer["choices"])
    greedy = served.chat(response_format={"type": "json_object"}, max_tokens=40, temperature=0)
    assert greedy.json()["choices"][0]["message"]["content"].lstrip().startswith("{")


def test_a_schema_that_cannot_be_followed_is_refused(served: Running) -> None:
    pytest.importorskip("llguidance")
    bad = {"name": "x", "schema": {"type": "string", "pattern": "(?=a)b"}}
    answer = served.chat(response_format={"type": "json_schema", "json_schema": bad})
    assert answer.status_code == 400
    assert "the schema cannot be followed" in answer.json()["error"]["message"]


def test_a_conversation_with_calls_and_empty_contents_is_taken(served: Running) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
        {"role": "user", "content": "Thanks."},
    ]
    assert served.post(CHAT, messages=messages, max_tokens=2).status_code == 200


def test_penalties_and_bias_reach_the_model(served: Running) -> None:
    body = {"max_tokens": 30, "temperature": 0}
    plain = served.chat(**body).json()["choices"][0]["message"]["content"]
    for option in (
        {"frequency_penalty": 2},
        {"presence_penalty": 2},
        {"repetition_penalty": 2.0, "repetition_penalty_range": 64},
    ):
        other = served.chat(**body, **option).json()["choices"][0]["message"]["content"]
        assert other != plain, option
    biased = served.chat(**body, logit_bias={"65": 100}, logprobs=True).json()["choices"][0]
    text = {it["token"] for it in biased["logprobs"]["content"]}
    assert len(text) == 1
    wrong = served.chat(logit_bias={"999999": 1})
    assert wrong.status_code == 400


def test_another_model_is_loaded_when_it_is_named(served: Running) -> None:
    first = served.chat(model=ONE, max_tokens=8, temperature=0).json()
    other = served.chat(model=OTHER, max_tokens=8, temperature=0).json()
    assert (first["model"], other["model"]) == (ONE, OTHER)
    assert served.client.get("/health").json()["model"] == OTHER
    again = served.chat(model=ONE, max_tokens=8, temperature=0).json()
    assert again["choices"] == first["choices"]
    assert served.chat(max_tokens=1).json()["model"] == ONE, "no name means the one that is loaded"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"temperature": True}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 1000}, "n"),
    ({"n": True}, "n"),
    ({"stream": 1}, "stream"),
    ({"seed": 1.5}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": 3}, "stop"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, None),
    ({"messages": [{"role": "user", "content": "x", "audio": {"id": "1"}}]}, "messages.0.audio"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, None),
    ({"temprature": 1}, "temprature"),
    ({"mirostat_mode": 2}, "mirostat_mode"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"rep_pen": 1.1, "repetition_penalty": 1.2}, "rep_pen"),
]


@pytest.mark.parametrize(("wrong", "param"), BAD)
def test_a_malformed_request_is_refused_in_words(
    served: Running, wrong: dict[str, Any], param: str | None
) -> None:
    answer = served.chat(**wrong)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    if param is not None:
        assert (error["param"] or "").startswith(param), error


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff", b'{"messages":'])
def test_a_body_that_is_no_request_is_refused(served: Running, body: bytes) -> None:
    answer = served.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_prompt_that_is_too_long_says_so_as_openai_does(served: Running) -> None:
    answer = served.chat("word " * 600)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    streamed = served.chat("word " * 600, stream=True)
    assert streamed.status_code == 400, "an error is no event while nothing was sent"


@pytest.mark.parametrize("name", ["nope", "../secret", "/etc/passwd", "a\0b", "", "demo"])
def test_a_name_that_no_model_has_does_not_exist(served: Running, name: str) -> None:
    answer = served.chat(model=name, max_tokens=1)
    if name == "":
        assert answer.status_code == 200, "an empty name is none"
        return
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_options_without_effect_are_told(served: Running) -> None:
    answer = served.chat(max_tokens=1, sampler_order=[6, 0], typical_p=1, dry_base=1.75)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-options"] == "sampler_order"
    assert answer.headers["x-request-id"].startswith("req-")
