"""The APIs beside OpenAI's chats: /v1/responses, Anthropic's, Ollama's, and the tokenizers'."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE, copy
from served import OTHER, Running, running
from test_server_parts import TOOLS_TEMPLATE, Scripted
from test_server_thinking import TEMPLATE, THOUGHT

from gptq_loader_extensions.openai.replies.response_store import (
    MAX_RESPONSES,
    ResponseStore,
    StoredResponse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
CALL = '<tool_call>\n{"name": "now", "arguments": {"zone": "UTC"}}\n</tool_call>'
ASK = [{"role": "user", "content": "Hello"}]
GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("served")) as it:
        yield it


def events(served: Running, route: str, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    """Return the named events of a stream."""
    with served.client.stream("POST", route, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        blocks = "".join(answer.iter_text()).strip().split("\n\n")
    pairs = [block.split("\n") for block in blocks]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in pairs
    ]


def lines(served: Running, route: str, **body: Any) -> list[dict[str, Any]]:
    """Return the lines of a stream of Ollama's."""
    with served.client.stream("POST", route, json=body) as answer:
        assert answer.status_code == 200, answer.read()
        assert answer.headers["content-type"] == "application/x-ndjson"
        return [json.loads(line) for line in answer.iter_lines()]


def chat_text(served: Running, messages: list[dict[str, Any]], count: int = 8) -> str:
    body = {"messages": messages, "max_tokens": count, **GREEDY}
    text: str = served.post("/v1/chat/completions", **body).json()["choices"][0]["message"][
        "content"
    ]
    return text


# /v1/responses


def test_a_response_says_what_a_chat_says(served: Running) -> None:
    answer = served.post(RESPONSES, input="Hello", max_output_tokens=8, **GREEDY).json()
    (message,) = answer["output"]
    assert answer["object"] == "response"
    assert message["content"][0]["text"] == chat_text(served, ASK)
    assert (answer["status"], message["status"]) == ("incomplete", "incomplete")
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert answer["usage"]["output_tokens"] == 8
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
    ]
    listed = served.post(RESPONSES, input=items, max_output_tokens=8, **GREEDY).json()
    system = {"role": "system", "content": "Be brief."}
    assert listed["output"][0]["content"][0]["text"] == chat_text(served, [system, *ASK])
    told = served.post(
        RESPONSES, input="Hello", instructions="Be brief.", max_output_tokens=8, **GREEDY
    ).json()
    assert told["output"][0]["content"] == listed["output"][0]["content"]


def test_the_events_of_a_response_are_in_order(served: Running) -> None:
    whole = served.post(RESPONSES, input="Hello", max_output_tokens=8, **GREEDY).json()
    sent = events(served, RESPONSES, input="Hello", max_output_tokens=8, **GREEDY)
    assert [data["sequence_number"] for _, data in sent] == list(range(len(sent)))
    assert [data["type"] for _, data in sent] == [name for name, _ in sent]
    names = [name.removeprefix("response.") for name, _ in sent]
    deltas = [data["delta"] for name, data in sent if name == "response.output_text.delta"]
    assert names == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    assert "".join(deltas) == whole["output"][0]["content"][0]["text"]
    last = sent[-1][1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert last["usage"] == whole["usage"]


def test_a_response_goes_on_from_another(served: Running) -> None:
    first = served.post(RESPONSES, input="Hello", max_output_tokens=8, **GREEDY).json()
    text = first["output"][0]["content"][0]["text"]
    body = {"input": "Go on.", "max_output_tokens": 8, **GREEDY}
    second = served.post(RESPONSES, previous_response_id=first["id"], **body).json()
    told = [*ASK, {"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
    assert second["output"][0]["content"][0]["text"] == chat_text(served, told)
    assert second["previous_response_id"] == first["id"]
    assert served.client.get(f"{RESPONSES}/{first['id']}").json() == first
    assert served.client.delete(f"{RESPONSES}/{first['id']}").json()["deleted"]
    assert served.client.get(f"{RESPONSES}/{first['id']}").status_code == 404
    gone = served.post(RESPONSES, previous_response_id=first["id"], **body)
    assert gone.status_code == 400
    assert gone.json()["error"]["code"] == "previous_response_not_found"
    third = served.post(RESPONSES, store=False, **body).json()
    assert served.client.get(f"{RESPONSES}/{third['id']}").status_code == 404


def test_items_of_earlier_responses_are_named_in_the_input(served: Running) -> None:
    """As the AI SDK and the Agents SDK do with what was kept."""
    first = served.post(RESPONSES, input="Hello", max_output_tokens=8, **GREEDY).json()
    item = first["output"][0]
    question = {"role": "user", "content": [{"type": "input_text", "text": "Go on."}]}
    body: dict[str, Any] = {"max_output_tokens": 8, **GREEDY}
    reference = {"type": "item_reference", "id": item["id"]}
    named = served.post(RESPONSES, input=[*ASK, reference, question], **body).json()
    whole = served.post(RESPONSES, input=[*ASK, item, question], **body).json()
    assert named["output"][0]["content"] == whole["output"][0]["content"]
    assert named["usage"] == whole["usage"]
    for missing in ({**reference, "id": "msg_nope"}, {"type": "item_reference"}):
        refused = served.post(RESPONSES, input=[missing, question], **body)
        assert refused.status_code == 404
        assert refused.json()["error"]["code"] == "item_not_found"
    served.client.delete(f"{RESPONSES}/{first['id']}")
    assert served.post(RESPONSES, input=[reference, question], **body).status_code == 404


def test_the_input_of_a_response_is_listed_in_pages(served: Running) -> None:
    body: dict[str, Any] = {"max_output_tokens": 8, **GREEDY}
    first = served.post(RESPONSES, input="Hello", **body).json()
    output = first["output"][0]
    fields = {"previous_response_id": first["id"], "input": [{"role": "user", "content": "And?"}]}
    second = served.post(RESPONSES, **fields, **body).json()
    route = f"{RESPONSES}/{second['id']}/input_items"
    whole = served.client.get(route, params={"order": "asc"}).json()
    texts = [item["content"][0]["text"] for item in whole["data"]]
    assert texts == ["Hello", output["content"][0]["text"], "And?"]
    assert [item["role"] for item in whole["data"]] == ["user", "assistant", "user"]
    assert whole["data"][1] == output
    assert whole["has_more"] is False
    pages: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while not pages or pages[-1]["has_more"]:
        pages.append(served.client.get(route, params={"limit": 2, **after}).json())
        after = {"after": pages[-1]["last_id"]}
    assert [item for page in pages for item in page["data"]] == whole["data"][::-1]
    assert len(pages) == 2
    reference = {"type": "item_reference", "id": output["id"]}
    named = served.post(RESPONSES, input=[reference, *ASK], **body).json()
    listed = served.client.get(f"{RESPONSES}/{named['id']}/input_items").json()["data"]
    assert listed[1] == output
    assert served.client.get(route, params={"limit": 0}).status_code == 400
    assert served.client.get(route, params={"after": "nope"}).status_code == 404
    assert served.client.get(f"{RESPONSES}/resp_nope/input_items").status_code == 404


def test_only_the_latest_responses_are_kept() -> None:
    store = ResponseStore()
    for i in range(MAX_RESPONSES + 5):
        store.add(StoredResponse({"id": str(i)}, (), 10))
    assert store.find("4") is None
    assert store.find("5") is not None
    large = {"id": "large", "output": [{"id": "item"}]}
    store.add(StoredResponse(large, (), 64 << 20))
    assert store.find_item("item") == {"id": "item"}
    assert store.find("large") is not None
    assert store.find("6") is None, "it made room"
    assert store.remove("large")
    assert store.find_item("item") is None
    assert not store.remove("large")


def test_calls_and_thoughts_are_items_of_a_response(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "models" / "tools")
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE + "{# </think> #}")
    loads = Scripted(f"<think>hm</think>Wait.{CALL}")
    tools = [{"type": "function", "name": "now", "parameters": {"type": "object"}}]
    with running(tmp_path, names=(), start="tools", loads=loads) as served:
        answer = served.post(RESPONSES, input="x", tools=[*tools, {"type": "web_search"}])
        assert answer.headers["x-ignored-options"] == "tools.web_search"
        thought, message, call = answer.json()["output"]
        assert thought["content"] == [{"type": "reasoning_text", "text": "hm"}]
        assert message["content"][0]["text"] == "Wait."
        assert (call["name"], call["arguments"]) == ("now", '{"zone": "UTC"}')
        sent = events(served, RESPONSES, input="x", tools=tools)
        added = [data["item"]["type"] for name, data in sent if name.endswith("item.added")]
        assert added == ["reasoning", "message", "function_call"]
        deltas = [data["delta"] for name, data in sent if name.endswith("call_arguments.delta")]
        assert "".join(deltas) == call["arguments"]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "noon"}
        again = served.post(
            RESPONSES, previous_response_id=answer.json()["id"], input=[output], tools=tools
        )
        assert again.status_code == 200
        stateless = [{"role": "user", "content": "x"}, *answer.json()["output"], output]
        same = served.post(RESPONSES, input=stateless, tools=tools).json()
        assert same["usage"]["input_tokens"] == again.json()["usage"]["input_tokens"]


def test_a_tool_that_takes_a_text_is_called_with_one(tmp_path: Path) -> None:
    loads = Scripted('<tool_call>{"name": "patch", "arguments": {"input": "a\\nb"}}</tool_call>')
    tools = [{"type": "custom", "name": "patch", "description": "Apply it."}]
    with running(tmp_path, names=(ONE,), loads=loads) as served:
        (call,) = served.post(RESPONSES, input="x", tools=tools).json()["output"]
        assert (call["type"], call["input"]) == ("custom_tool_call", "a\nb")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input.0.role"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "conversation": "c"}, "conversation"),
        ({"input": "x", "tool_choice": "required"}, "tool_choice"),
        ({"input": "x", "n": 2}, "n"),
        ({"input": "x", "temprature": 1}, "temprature"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "response_format"),
    ],
)
def test_a_malformed_response_is_refused(
    served: Running, fields: dict[str, Any], param: str
) -> None:
    answer = served.post(RESPONSES, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_response_counts_its_tokens_first(served: Running) -> None:
    counted = served.post(f"{RESPONSES}/input_tokens", input="Hello").json()
    whole = served.post(RESPONSES, input="Hello", max_output_tokens=1).json()
    assert counted["input_tokens"] == whole["usage"]["input_tokens"]


# Anthropic's


def test_a_message_says_what_a_chat_says(served: Running) -> None:
    body = {"messages": ASK, "max_tokens": 8, **GREEDY}
    answer = served.post(MESSAGES, **body).json()
    assert answer["content"] == [{"type": "text", "text": chat_text(served, ASK)}]
    assert (answer["type"], answer["stop_reason"]) == ("message", "max_tokens")
    system = served.post(MESSAGES, system=[{"type": "text", "text": "Be brief."}], **body).json()
    told = [{"role": "system", "content": "Be brief."}, *ASK]
    assert system["content"][0]["text"] == chat_text(served, told)
    sent = events(served, MESSAGES, **body)
    names = [name for name, _ in sent]
    assert names[:2] == ["message_start", "content_block_start"]
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    texts = [data["delta"]["text"] for name, data in sent if name == "content_block_delta"]
    assert "".join(texts) == answer["content"][0]["text"]
    counted = served.post(f"{MESSAGES}/count_tokens", messages=ASK).json()
    assert counted == {"input_tokens": answer["usage"]["input_tokens"]}


def test_a_stop_sequence_is_told_from_an_end(served: Running) -> None:
    text = chat_text(served, ASK, 30)
    stop = text[len(text) // 2 :][:2]
    answer = served.post(
        MESSAGES, messages=ASK, max_tokens=30, stop_sequences=[stop], **GREEDY
    ).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert answer["content"][0]["text"] == text[: text.index(stop)]


def test_a_message_goes_on_with_the_assistants(served: Running) -> None:
    begun = [*ASK, {"role": "assistant", "content": "The answer"}]
    answer = served.post(MESSAGES, messages=begun, max_tokens=8, **GREEDY).json()
    body = {"messages": begun, "continue_final_message": True, "max_tokens": 8, **GREEDY}
    right = served.post("/v1/chat/completions", **body).json()
    assert answer["content"][0]["text"] == right["choices"][0]["message"]["content"]
    turn = served.post("/v1/chat/completions", messages=begun, max_tokens=8).json()
    assert right["usage"]["prompt_tokens"] < turn["usage"]["prompt_tokens"]


def test_calls_and_thoughts_are_blocks_of_a_message(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "models" / "tools")
    (folder / "chat_template.jinja").write_text(TOOLS_TEMPLATE + "{# </think> #}")
    loads = Scripted(f"<think>hm</think>Wait.{CALL}")
    tools = [{"name": "now", "input_schema": {"type": "object"}}]
    with running(tmp_path, names=(), start="tools", loads=loads) as served:
        body = {"messages": ASK, "max_tokens": 100, "tools": tools}
        answer = served.post(MESSAGES, **body).json()
        thought, text, call = answer["content"]
        assert (thought["type"], thought["thinking"]) == ("thinking", "hm")
        assert text == {"type": "text", "text": "Wait."}
        assert (call["name"], call["input"]) == ("now", {"zone": "UTC"})
        assert answer["stop_reason"] == "tool_use"
        sent = [data for _, data in events(served, MESSAGES, **body)]
        begun = [it["content_block"]["type"] for it in sent if "content_block" in it]
        assert begun == ["thinking", "text", "tool_use"]
        parts = [it["delta"].get("partial_json", "") for it in sent if "delta" in it]
        assert json.loads("".join(parts)) == {"zone": "UTC"}
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": "noon"}
        messages = [
            *ASK,
            {"role": "assistant", "content": answer["content"]},
            {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
        ]
        assert served.post(MESSAGES, **{**body, "messages": messages}).status_code == 200


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [
        ({"model": "nope"}, 404, "not_found_error"),
        ({"max_tokens": 0}, 400, "invalid_request_error"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, None),
        ({"colour": 1}, 400, None),
        ({"container": "c"}, 400, None),
    ],
)
def test_anthropics_errors_have_its_shape(
    served: Running, fields: dict[str, Any], status: int, kind: str | None
) -> None:
    answer = served.post(MESSAGES, **{"messages": ASK, "max_tokens": 5, **fields})
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["type"] == "error"
    assert body["error"]["type"] == kind or kind is None
    assert body["error"]["message"]


def test_a_thread_of_anthropics_is_sent_whole_again(served: Running) -> None:
    """As the tool runner of Anthropic's SDK begins one, and what it reads of the answer."""
    body: dict[str, Any] = {"max_tokens": 8, "messages": ASK, **GREEDY}
    begun = served.post(MESSAGES, thread={"type": "create"}, **body)
    assert begun.headers["x-ignored-options"] == "thread"
    assert begun.json()["content"] == served.post(MESSAGES, **body).json()["content"]
    thread = {"type": "continue", "previous_message_id": begun.json()["id"]}
    for messages in (ASK, []):
        lost = served.post(MESSAGES, **{**body, "thread": thread, "messages": messages})
        assert lost.status_code == 404
        error = lost.json()["error"]
        assert error["type"] == "not_found_error"
        assert error["details"] == {"error_code": "thread_not_found"}
    assert served.post(MESSAGES, **{**body, "messages": []}).status_code == 400
    assert served.post(MESSAGES, thread={"type": "fork"}, **body).status_code == 400


def test_anthropics_clients_list_models(served: Running) -> None:
    headers = {"anthropic-version": "2023-06-01"}
    listed = served.client.get("/v1/models", headers=headers).json()
    assert {(it["type"], it["id"]) for it in listed["data"]} == {("model", OTHER), ("model", ONE)}
    assert listed["has_more"] is False


# Ollama's


def test_ollamas_chat_says_what_a_chat_says(served: Running) -> None:
    body = {"model": f"{ONE}:latest", "messages": ASK, "options": {"num_predict": 8, **GREEDY}}
    whole = served.post("/api/chat", stream=False, **body).json()
    assert whole["message"] == {"role": "assistant", "content": chat_text(served, ASK)}
    assert (whole["done"], whole["done_reason"], whole["eval_count"]) == (True, "length", 8)
    sent = lines(served, "/api/chat", **body)
    assert [it["done"] for it in sent] == [*[False] * (len(sent) - 1), True]
    assert "".join(it["message"]["content"] for it in sent) == whole["message"]["content"]
    prompt = {"prompt": "Hello", "options": body["options"]}
    assert served.post("/api/generate", stream=False, **prompt).json()["response"] == chat_text(
        served, ASK
    )
    raw = served.post("/api/generate", stream=False, raw=True, **prompt).json()
    right = served.post("/v1/completions", prompt="Hello", max_tokens=8, **GREEDY).json()
    assert raw["response"] == right["choices"][0]["text"]
    sent = lines(served, "/api/generate", raw=True, **prompt)
    assert "".join(it["response"] for it in sent) == raw["response"]


def test_ollamas_options_form_and_machine(served: Running) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"c": {"enum": ["x", "y"]}}, "required": ["c"]}
    options = {"num_predict": 60, "num_gpu": 99, "num_ctx": 512, "repeat_last_n": -1}
    answer = served.post("/api/chat", messages=ASK, stream=False, format=schema, options=options)
    assert answer.headers["x-ignored-options"] == "num_gpu"
    assert json.loads(answer.json()["message"]["content"])["c"] in ("x", "y")


def test_ollamas_logprobs_are_those_of_a_chat(served: Running) -> None:
    options = {"num_predict": 8, **GREEDY}
    chat = served.post(
        "/v1/chat/completions",
        messages=ASK,
        max_tokens=8,
        logprobs=True,
        top_logprobs=2,
        **GREEDY,
    ).json()["choices"][0]["logprobs"]["content"]
    fields: dict[str, Any] = {"options": options, "logprobs": True, "top_logprobs": 2}
    whole = served.post("/api/chat", messages=ASK, stream=False, **fields).json()
    assert whole["logprobs"] == chat
    parts = lines(served, "/api/generate", prompt="Hello", **fields)
    assert [token for part in parts for token in part.get("logprobs", ())] == chat
    raw = served.post("/api/generate", prompt="Hello", raw=True, stream=False, **fields)
    assert raw.status_code == 400
    fields["logprobs"] = False
    assert served.post("/api/chat", messages=ASK, stream=False, **fields).status_code == 400


def test_ollamas_calls_and_thoughts(tmp_path: Path) -> None:
    with running(tmp_path, names=(ONE,), loads=Scripted(CALL)) as served:
        function = {"name": "now", "parameters": {"type": "object"}}
        body = {"messages": ASK, "tools": [{"type": "function", "function": function}]}
        message = served.post("/api/chat", stream=False, **body).json()["message"]
        (call,) = message["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": {"zone": "UTC"}}
        sent = lines(served, "/api/chat", **body)
        assert [it["message"]["tool_calls"][0]["function"]["name"] for it in sent[:-1]] == ["now"]
        answered = [*ASK, message, {"role": "tool", "content": "noon", "tool_name": "now"}]
        assert served.post("/api/chat", **{**body, "messages": answered}).status_code == 200
    folder = copy(ONE, tmp_path / "models" / "thinker")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with running(tmp_path, names=(), start="thinker", loads=Scripted(THOUGHT)) as served:
        message = served.post("/api/chat", messages=ASK, think=True, stream=False).json()["message"]
        assert (message["thinking"], message["content"]) == ("easy,\n\nI think", "10 is it.")
        assert "thinking" in served.post("/api/show", model="thinker").json()["capabilities"]


def test_ollamas_models(served: Running) -> None:
    assert {it["name"] for it in served.client.get("/api/tags").json()["models"]} == {OTHER, ONE}
    assert served.client.get("/api/version").json()["version"]
    loaded = served.post("/api/generate", model=OTHER).json()
    assert (loaded["model"], loaded["done_reason"]) == (OTHER, "load")
    assert [it["name"] for it in served.client.get("/api/ps").json()["models"]] == [OTHER]
    shown = served.post("/api/show", model=ONE).json()
    assert shown["details"]["quantization_level"] == "4-bit"
    assert served.post("/api/chat", model=ONE, stream=False).json()["done_reason"] == "load"


@pytest.mark.parametrize(
    ("route", "fields", "status"),
    [
        ("/api/chat", {"model": "nope", "messages": ASK}, 404),
        ("/api/chat", {"messages": ASK, "options": {"mirostat": 2}}, 400),
        ("/api/chat", {"messages": ASK, "colour": 1}, 400),
        ("/api/chat", {"messages": [{**ASK[0], "images": ["x"]}]}, 400),
        ("/api/generate", {"prompt": "x", "template": "y"}, 400),
        ("/api/embed", {"input": "x"}, 501),
    ],
)
def test_ollamas_errors_are_a_text(
    served: Running, route: str, fields: dict[str, Any], status: int
) -> None:
    answer = served.post(route, **fields)
    assert answer.status_code == status
    assert isinstance(answer.json()["error"], str)


def test_ollamas_routes_that_are_not_here_answer_with_a_text(served: Running) -> None:
    answer = served.client.post("/api/push", json={"model": ONE})
    assert answer.status_code == 404
    assert "there is no route POST /api/push here" in answer.json()["error"]


# Tokens


def test_tokens_there_and_back(served: Running) -> None:
    text = "Hello there, \u00f1and\u00fa"
    ids = served.post("/tokenize", prompt=text).json()
    assert ids["count"] == len(ids["tokens"])
    assert ids["max_model_len"] == 512
    assert served.post("/detokenize", tokens=ids["tokens"]).json()["prompt"] == text
    llama = served.post("/tokenize", content=text, with_pieces=True).json()["tokens"]
    assert "".join(it["piece"] for it in llama if "\ufffd" not in it["piece"])
    chat = served.post("/tokenize", messages=ASK).json()
    usage = served.chat(max_tokens=1).json()["usage"]
    assert chat["count"] == usage["prompt_tokens"]
    shorter = served.post("/tokenize", messages=ASK, add_generation_prompt=False).json()
    assert shorter["count"] < chat["count"]
    assert served.client.get("/tokenizer_info").json()["vocab_size"]


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": ASK}),
        ("/tokenize", {"prompt": "a", "colour": 1}),
        ("/tokenize", {"messages": [{"role": "x"}]}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_malformed_tokens_are_refused(served: Running, route: str, fields: dict[str, Any]) -> None:
    assert served.post(route, **fields).status_code == 400
