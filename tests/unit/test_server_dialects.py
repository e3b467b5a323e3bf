"""What clients of other servers send: their values, headers, addresses and names."""

from __future__ import annotations

import gzip
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE
from parrot import parrot
from served import CHAT, COMPLETE, Running, running

from gptq_loader_extensions.openai.settings import Settings
from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ASK = [{"role": "user", "content": "Hello"}]
BODY = {"messages": ASK, "max_tokens": 4, "temperature": 0}
PAGE = "http://localhost:3000"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    cors = (PAGE, "app://obsidian.md", "vscode-webview://*")
    with running(tmp_path_factory.mktemp("served"), names=(ONE,), cors=cors) as it:
        yield it


# Values


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": -1},
        {"max_completion_tokens": -1},
        {"max_tokens": None, "n_predict": -1},
        {"max_tokens": None, "num_predict": -2},
    ],
)
def test_minus_one_is_as_many_as_there_is_room_for(served: Running, fields: dict[str, Any]) -> None:
    free = {name: value for name, value in BODY.items() if name != "max_tokens"}
    whole = served.post(CHAT, **free).json()["choices"]
    assert served.post(CHAT, **{**BODY, **fields}).json()["choices"] == whole


@pytest.mark.parametrize(
    "fields",
    [
        {"repeat_last_n": -1, "repeat_penalty": 1},
        {"seed": -1},
        {"truncation_length": 512},
        {"max_context_length": -1},
        {"num_ctx": 0},
        {"stop_token_ids": [], "use_beam_search": False, "min_tokens": 0, "ignore_eos": False},
        {"include_stop_str_in_output": False, "skip_special_tokens": True, "detokenize": True},
        {"cache_prompt": True, "id_slot": -1, "n_keep": 0, "return_tokens": False, "lora": []},
        {"separate_reasoning": True, "stream_reasoning": True, "lora_path": None, "rid": "x"},
        {"add_generation_prompt": True, "continue_final_message": False, "echo": False},
        {"priority": 0, "bad_words": [], "allowed_token_ids": None, "prompt_logprobs": None},
        {"parallel_tool_calls": False},
        {"chat_template_kwargs": {}},
        {"truncate_prompt_tokens": -1, "transforms": [], "plugins": [], "models": []},
        {"random_seed": None, "safe_prompt": False, "enable_search": False},
        {"cache_control": {"type": "ephemeral"}, "tool_stream": True, "reasoning_split": True},
        {"reasoning_budget": -1, "thinking_budget_tokens": -1},
        {"of_tomorrow": None, "logits_processors": None},
    ],
)
def test_what_asks_for_nothing_changes_nothing(served: Running, fields: dict[str, Any]) -> None:
    plain = served.post(CHAT, **BODY).json()["choices"]
    answer = served.post(CHAT, **{**BODY, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == plain
    assert "x-ignored-options" not in answer.headers


def test_hints_without_effect_are_told(served: Running) -> None:
    hints = {"reasoning_effort": "low", "verbosity": "high", "service_tier": "flex", "store": True}
    hints |= {"prediction": {"type": "content", "content": "x"}}
    answer = served.post(CHAT, **BODY, **hints)
    assert answer.headers["x-ignored-options"] == ", ".join(sorted(hints))
    messages = [*ASK, {"role": "assistant", "content": "x", "reasoning_details": [1]}, *ASK]
    answer = served.post(CHAT, messages=messages, max_tokens=1)
    assert answer.headers["x-ignored-options"] == "messages.reasoning_details"


def test_the_oldest_turns_of_a_chat_are_left_out(served: Running) -> None:
    turn = [
        {"role": "user", "content": "word " * 30},
        {"role": "assistant", "content": "word " * 30},
    ]
    system = {"role": "system", "content": "Be brief."}
    messages = [system, *turn * 6, *ASK]
    assert served.post(CHAT, messages=messages).status_code == 400
    cut = served.post(CHAT, messages=messages, max_tokens=8, num_ctx=256, temperature=0).json()
    assert cut["usage"]["prompt_tokens"] <= 248
    for count in range(7):
        kept = [system, *turn * count, *ASK]
        right = served.post(CHAT, messages=kept, max_tokens=8, temperature=0).json()
        if right["usage"]["prompt_tokens"] == cut["usage"]["prompt_tokens"]:
            assert right["choices"] == cut["choices"], "the system message is kept"
            break
    else:
        pytest.fail("it is none of the conversation's ends")
    longer = served.post(CHAT, messages=[{**ASK[0], "content": "word " * 600}], num_ctx=512)
    assert longer.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    "fields",
    [
        {"add_generation_prompt": False, "continue_final_message": True},
        {"continue_final_message": True},
        {"messages": [*ASK, {"role": "assistant", "content": "The answer", "prefix": True}]},
        {"messages": [*ASK, {"role": "assistant", "content": "The answer", "partial": True}]},
        {
            "messages": [
                *ASK,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "The "},
                        {"type": "output_text", "text": "answer"},
                    ],
                },
            ],
            "continue_final_message": True,
        },
    ],
)
def test_a_reply_goes_on_with_the_last_message(served: Running, fields: dict[str, Any]) -> None:
    begun = [*ASK, {"role": "assistant", "content": "The answer"}]
    body = {**BODY, "messages": begun, **fields}
    answer = served.post(CHAT, **body).json()
    rendered = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nThe answer"
    ids = served.post("/tokenize", prompt=rendered).json()["tokens"]
    right = served.post(COMPLETE, prompt=ids, max_tokens=4, temperature=0).json()
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["message"]["content"] == right["choices"][0]["text"]


@pytest.mark.parametrize(
    "fields",
    [
        {"continue_final_message": True},
        {
            "messages": [*ASK, {"role": "assistant", "content": "x"}],
            "continue_final_message": True,
            "add_generation_prompt": True,
        },
        {"messages": [{**ASK[0], "prefix": True}]},
    ],
)
def test_what_cannot_go_on_is_refused(served: Running, fields: dict[str, Any]) -> None:
    assert served.post(CHAT, **{**BODY, **fields}).status_code == 400


def test_usage_in_every_chunk(served: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = served.events(CHAT, **BODY, stream_options=options)[:-1]
    counts = [it["usage"]["completion_tokens"] for it in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4


# Bodies


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", None])
def test_a_body_is_json_whatever_it_is_called(served: Running, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = served.client.post(CHAT, content=json.dumps(BODY), headers=headers)
    assert answer.status_code == 200
    headers["origin"] = "http://evil.example"
    assert served.client.post(CHAT, content=json.dumps(BODY), headers=headers).status_code == 403


def test_a_compressed_body_is_refused_by_name(served: Running) -> None:
    packed = gzip.compress(json.dumps(BODY).encode())
    answer = served.client.post(CHAT, content=packed, headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert "Content-Encoding" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("route", "fields", "param", "words"),
    [
        (CHAT, {"stop": [""]}, "stop.0", "at least 1 character"),
        (CHAT, {"stop": 3}, "stop", "valid string or"),
        (CHAT, {"tool_choice": "force"}, "tool_choice", "'none', 'auto' or 'required'"),
        (CHAT, {"extra_body": {"top_k": 3}}, "extra_body", "send what is in it"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions", "send tools"),
        (CHAT, {"reasoning": {"efort": "low"}}, "reasoning.efort", "not permitted"),
        (CHAT, {"n_predict": "a", "max_tokens": None}, "n_predict", "integer"),
        (CHAT, {"messages": [{"content": "x"}]}, "messages.0.role", "required"),
        (COMPLETE, {"prompt": ["a"] * 65}, "prompt", "at most 64"),
        (COMPLETE, {"prompt": ["a", 1]}, "prompt.1", "string"),
        (COMPLETE, {"prompt": [[1, -1]]}, "prompt.0.1", "greater"),
        (COMPLETE, {}, "prompt", "required"),
    ],
)
def test_the_field_that_is_wrong_is_named(
    served: Running, route: str, fields: dict[str, Any], param: str, words: str
) -> None:
    body = BODY if route == CHAT else {"max_tokens": 4}
    error = served.post(route, **{**body, **fields}).json()["error"]
    assert error["param"] == param
    assert words in error["message"]


# Forms


FUNCTION = {
    "name": "now",
    "parameters": {
        "type": "object",
        "properties": {"zone": {"enum": ["UTC"]}},
        "required": ["zone"],
    },
}
TOOL = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "any"},
        {"tool_choice": {"type": "any"}},
        {"tool_choice": {"type": "required"}},
        {"tool_choice": {"type": "tool", "name": "now"}},
        {"tool_choice": {"type": "function", "name": "now"}},
        {"tool_choice": {"function": {"name": "now"}}},
        {"tools": [{"type": "function", **FUNCTION}], "tool_choice": "required"},
        {"tools": [{"function": FUNCTION}], "tool_choice": "required"},
    ],
)
def test_tools_and_choices_are_read_as_other_apis_have_them(
    served: Running, fields: dict[str, Any]
) -> None:
    pytest.importorskip("llguidance")
    body = {**BODY, "max_tokens": 100, "tools": [TOOL], **fields}
    (call,) = served.post(CHAT, **body).json()["choices"][0]["message"]["tool_calls"][:1]
    assert call["function"] == {"name": "now", "arguments": '{"zone": "UTC"}'}


@pytest.mark.parametrize("choice", ["none", {"type": "none"}, "auto", {"type": "auto"}])
def test_a_choice_may_say_its_type(served: Running, choice: Any) -> None:
    name = choice if isinstance(choice, str) else choice["type"]
    plain = served.post(CHAT, **BODY, tools=[TOOL], tool_choice=name).json()
    assert (
        served.post(CHAT, **BODY, tools=[TOOL], tool_choice=choice).json()["choices"]
        == (plain["choices"])
    )


def test_calls_are_sent_back_as_other_clients_write_them(served: Running) -> None:
    """Without ids, with parsed arguments, and answered by nothing."""

    def prompt_tokens(call: dict[str, Any], answer: dict[str, Any]) -> int:
        messages = [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}, answer]
        reply = served.post(CHAT, **{**BODY, "messages": messages}, tools=[TOOL])
        assert reply.status_code == 200, reply.text
        return int(reply.json()["usage"]["prompt_tokens"])

    right = prompt_tokens(
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "now", "arguments": '{"zone": "UTC"}'},
        },
        {"role": "tool", "tool_call_id": "call_1", "content": ""},
    )
    parsed = {"function": {"name": "now", "arguments": {"zone": "UTC"}}}
    assert prompt_tokens(parsed, {"role": "tool", "content": None}) == right
    assert (
        prompt_tokens({**parsed, "id": None, "index": 0}, {"role": "tool", "content": ""}) == right
    )


def test_parts_of_text_go_by_other_names(served: Running) -> None:
    refusal = [{"type": "refusal", "refusal": "Hello"}]
    for content in ([{"type": "input_text", "text": "Hello"}], refusal):
        same = served.post(CHAT, **{**BODY, "messages": [{"role": "user", "content": content}]})
        assert same.json()["choices"] == served.post(CHAT, **BODY).json()["choices"]
    kept = served.post(CHAT, **{**BODY, "messages": [{**ASK[0], "id": "m1"}]})
    assert kept.headers["x-ignored-options"] == "messages.id"


def test_a_prompt_that_is_too_long_is_told_in_each_apis_words(served: Running) -> None:
    """Agents look for these, and for the numbers, to make room."""
    messages = [{"role": "user", "content": "word " * 600}]
    chat = served.post(CHAT, messages=messages).json()["error"]
    assert chat["code"] == "context_length_exceeded"
    found = re.fullmatch(
        r"This model's maximum context length is (\d+) tokens\. However, your messages resulted in "
        r"(\d+) tokens\. Please reduce the length of the messages, or leave the oldest ones out\.",
        chat["message"],
    )
    assert found
    assert int(found[1]) == 512 < int(found[2])
    response = served.post("/v1/responses", input=messages).json()["error"]
    assert response["code"] == "context_length_exceeded"
    message = served.post("/v1/messages", messages=messages, max_tokens=4).json()["error"]
    assert re.match(rf"prompt is too long: {found[2]} tokens > 512 maximum", message["message"])
    assert message["type"] == "invalid_request_error"
    ollama = served.post("/api/chat", messages=messages).json()["error"]
    assert ollama == chat["message"]


# Addresses


@pytest.mark.parametrize(
    "path",
    [
        "/chat/completions",
        "/v1/chat/completions/",
        "/v1/v1/chat/completions",
        "//v1//chat/completions",
    ],
)
def test_a_base_address_may_be_typed_in_other_ways(served: Running, path: str) -> None:
    assert served.post(path, **BODY).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("POST", "/completion", 404),
        ("GET", "/props", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1", 404),
        ("DELETE", "/v1/models", 405),
        ("GET", CHAT, 405),
    ],
)
def test_an_unknown_route_is_named(served: Running, method: str, path: str, status: int) -> None:
    answer = served.client.request(method, path)
    assert answer.status_code == status
    assert f"{method} {path}" in answer.json()["error"]["message"]


def test_health_may_be_asked_for_its_head(served: Running) -> None:
    assert served.client.head("/health").status_code == 200
    assert served.client.head("/v1/models").status_code == 200


# Names and origins


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("host.docker.internal:8000", 200),
        ("host.containers.internal", 200),
        ("localhost.:8000", 200),
        ("app.localhost", 200),
        ("internal", 403),
        ("evil.internal", 403),
        ("host.docker.internal.evil.example", 403),
        ("localhost.evil.example", 403),
        ("evillocalhost", 403),
    ],
)
def test_a_container_reaches_the_machine_by_its_name(
    served: Running, host: str, status: int
) -> None:
    assert served.client.get("/v1/models", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (PAGE, True),
        ("app://obsidian.md", True),
        ("vscode-webview://0a1b2c", True),
        ("http://localhost:3001", False),
        ("http://localhost:3000.evil.example", False),
        ("app://obsidian.md.evil", False),
        ("app://other", False),
        ("null", False),
    ],
)
def test_a_page_that_may_call_may_send_its_headers(
    served: Running, origin: str, allowed: bool
) -> None:
    names = "authorization,content-type,x-stainless-lang,x-stainless-os,http-referer,x-title"
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": names,
        "access-control-request-private-network": "true",
    }
    answer = served.client.options(CHAT, headers=headers)
    assert (answer.status_code == 200) is allowed
    assert (answer.headers.get("access-control-allow-origin") == origin) is allowed
    if allowed:
        sent = {it.strip() for it in answer.headers["access-control-allow-headers"].split(",")}
        assert set(names.split(",")) <= {it.lower() for it in sent}
        assert answer.headers["access-control-allow-private-network"] == "true"
    status = served.client.get("/v1/models", headers={"origin": origin}).status_code
    assert status == (200 if allowed else 403)


@pytest.mark.parametrize(
    "origin", ["https://*", "http://a/b", "obsidian", "app:/x", "http://*.com"]
)
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(OptionInvalid, match="not an origin"):
        Settings(cors=(origin,)).check()


def test_where_a_reply_ends_is_the_clients_to_say(tmp_path: Path) -> None:
    folder = parrot(tmp_path / "models" / "parrot", ["one ", "two ", "three"])
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    (two,) = [it["id"] for it in added if it["content"] == "two "]
    with running(tmp_path, names=(), start="parrot") as served:

        def reply(**fields: Any) -> tuple[str, str, int]:
            body = {**BODY, "max_tokens": 9, **fields}
            whole = served.post(CHAT, **body).json()
            (choice,) = whole["choices"]
            usage = whole["usage"]["completion_tokens"]
            return choice["message"]["content"], choice["finish_reason"], usage

        assert reply() == ("one two three", "stop", 4)
        assert reply(stop_token_ids=[two]) == ("one ", "stop", 2)
        text, finish, tokens = reply(ignore_eos=True)
        assert text.startswith("one two three")
        assert (finish, tokens) == ("length", 9)
        assert reply(min_tokens=6)[2] >= 6
        assert reply(min_tokens=3, stop_token_ids=[two])[2] > 3
        refused = served.post(CHAT, **BODY, stop_token_ids=[100_000])
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "stop_token_ids"
