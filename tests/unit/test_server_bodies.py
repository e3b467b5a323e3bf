"""Whatever a body holds, it is answered, or refused in words: never a fault of the server."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE, copy
from hypothesis import given
from hypothesis import strategies as st
from served import CHAT, COMPLETE, Running, running
from test_server_parts import TOOLS_TEMPLATE

from gptq_loader_extensions.openai.schema.json_text import MAX_VALUES, parse_body, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTROL = "<|im_end|>"
PRIVATE = "".join(map(chr, range(0xE000, 0xF900)))
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    tools = copy(ONE, folder / "models" / "tools")
    (tools / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    with running(folder, names=(), start="tools") as it:
        yield it


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": [' + b"[]," * 500_000 + b"[]]}", "more than 200,000"),
        (b'{"prompt": [' + b'"",' * 500_000 + b'""]}', "more than 200,000"),
        (b'{"prompt": ' + DEEP.encode() + b"}", "nested too deeply"),
        (b'{"prompt": "\\ud800"}', "not JSON"),
        (b'{"prompt": "x", "max_tokens": 1' + b"0" * 6000 + b"}", "not JSON"),
        (b'{"prompt": "x", "temperature": 1e400}', "temperature"),
        (b'{"prompt": "x", "temperature": NaN}', "temperature"),
        (b'{"prompt": [' + b"-1," * 1_000_000 + b"1]}", "prompt"),
        (b'{"\\u0000": 1, "prompt": "x"}', "no option"),
    ],
    ids=range(9),
)
def test_a_body_that_is_too_much_is_refused_in_words(
    served: Running, content: bytes, words: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = served.client.post(COMPLETE, content=content, headers=headers)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


@given(st.lists(st.sampled_from(['"', "\\", "[", "{", "a", "\\\\"]), max_size=60).map("".join))
def test_what_a_text_spells_is_no_list(text: str) -> None:
    few = json.dumps({"text": text, "x": [text]}).encode()
    padded = few + b" " * MAX_VALUES
    assert parse_body(padded) == {"text": text, "x": [text]}


def test_a_text_may_have_as_many_brackets_as_it_likes() -> None:
    text = '[{"\\' * (MAX_VALUES // 2)
    assert parse_body(json.dumps([text]).encode()) == [text]


def test_json_of_200_levels_is_the_deepest() -> None:
    assert parse_json("[" * 150 + "]" * 150)
    with pytest.raises(ValueError, match="recursion"):
        parse_json("[" * 300 + "]" * 300)


# Faults of a request are no faults of the server


def test_what_is_nested_deep_or_private_is_text(served: Running) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": DEEP}}
    user = {"role": "user", "content": "x"}
    messages = [user, {"role": "assistant", "content": None, "tool_calls": [call]}, user]
    private = [{"role": "user", "content": f"{CONTROL}</s>{PRIVATE}"}]
    for body in (messages, private):
        answer = served.post(CHAT, messages=body, max_tokens=1)
        assert answer.status_code in (200, 400)
        if answer.status_code == 400:
            assert answer.json()["error"]["code"] == "context_length_exceeded"
    levels: Any = {}
    for _ in range(190):
        levels = {"a": levels}
    tool = {"type": "function", "function": {"name": "f", "parameters": levels}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": levels}}
    for body in ({"tools": [tool]}, {"response_format": form}, {"stop": levels}, {"x": levels}):
        assert served.chat(max_tokens=1, **body).status_code in (200, 400)


ODD: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2, 0.5, 2**31, 2**63, 10**400, "", "x", "\x00", "\u202e", "a" * 3000,
    CONTROL, "{{ 7*7 }}", "../x", PRIVATE[:300], "\U0001f600" * 50, [], [None], [[]], [[[[]]]],
    ["x"] * 200, {}, {"": None}, {"a": {"b": {"c": []}}}, [1, "x"], [[1], ["x"]],
)  # fmt: skip
RAW = (
    b"", b"null", b"[]", b'"x"', b"{", b"\xff\xfe", b"[" * 50_000, b'{"prompt":' * 10_000,
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"text": "\\udc00"}',
    '{"prompt": "x"}'.encode("utf-16"), b'{"prompt": NaN}', b'{"prompt": -Infinity}',
    b'{"prompt": "x", "prompt": 1e400}', b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}",
)  # fmt: skip


def altered_body(draw: random.Random, body: Any) -> Any:
    """Put something odd in the place of a part of a body."""
    if draw.random() < 0.2 or not isinstance(body, dict | list) or not body:
        return draw.choice(ODD)
    if isinstance(body, list):
        at = draw.randrange(len(body))
        return [*body[:at], altered_body(draw, body[at]), *body[at + 1 :]]
    if draw.random() < 0.1:
        return {**body, draw.choice(("x", "\x00", "typical_p", "num_ctx")): draw.choice(ODD)}
    name = draw.choice([*body])
    return {**body, name: altered_body(draw, body[name])}


FULL: dict[str, dict[str, Any]] = {
    CHAT: {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "x"}]},
            {"role": "user", "content": "x", "name": "y"},
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "z",
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "content": "x", "tool_call_id": "1"},
            {"role": "user", "content": "x"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": [1]}}}],
        "tool_choice": "auto",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "x", "schema": {"enum": ["a", 1], "pattern": "a*"}},
        },
        "max_tokens": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": 1},
        "stop": ["a"],
        "n": 2,
    },
    COMPLETE: {
        "prompt": ["x", "y"],
        "max_tokens": 2,
        "logprobs": 2,
        "echo": True,
        "seed": 1,
        "temperature": 0.5,
        "top_p": 0.5,
        "repetition_penalty": 1.1,
        "repetition_penalty_range": 5,
        "truncation_length": 20,
        "stop": "a",
    },
    "/api/v1/generate": {"prompt": "x", "memory": "y", "max_length": 2, "rep_pen": 1.1},
    "/api/extra/generate/stream": {"prompt": "x", "max_length": 2, "genkey": "k"},
    "/api/extra/generate/check": {"genkey": "k"},
    "/api/extra/abort": {"genkey": "k"},
    "/api/extra/tokencount": {"prompt": "x"},
    "/v1/internal/encode": {"text": "x"},
    "/v1/internal/decode": {"tokens": [1, 2]},
    "/v1/internal/token-count": {"text": "x"},
    "/v1/internal/logits": {"prompt": "x", "top_logits": 5},
    "/v1/internal/model/load": {"model_name": "tools", "args": None},
    "/v1/embeddings": {"input": "x"},
}


@pytest.mark.parametrize("path", FULL)
def test_no_body_is_a_fault_of_the_server(
    served: Running, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(path)
    headers = {"content-type": "application/json"}
    bodies = [json.dumps(altered_body(draw, FULL[path])).encode() for _ in range(60)]
    for body in (json.dumps(FULL[path]).encode(), *RAW, *bodies):
        answer = served.client.post(path, content=body, headers=headers)
        assert answer.status_code in (200, 400, 404, 501), (body[:500], answer.text)
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, body[:500]
        elif answer.headers["content-type"].startswith("text/event-stream"):
            assert "internal_error" not in answer.text, body[:500]
    assert not [it for it in caplog.records if it.levelname == "ERROR"], caplog.text
