"""Calls of functions: required, named, one at a time, with any template, as models write them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE, copy
from hypothesis import given
from hypothesis import strategies as st
from served import CHAT, Running, running
from test_server_parts import TOOLS_TEMPLATE, Scripted, read

from gptq_loader_extensions.openai.replies.tool_parsers import BareToolParser, HermesToolParser

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def tool(name: str = "get_weather", **more: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
    }
    function = {"name": name, "description": "It.", "parameters": parameters, **more}
    return {"type": "function", "function": function}


ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [NAMED]}}
LLAMA_TEMPLATE = """{% if tools %}{# "parameters": dictionary #}{{ tools | tojson }}{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{{ message.tool_calls or "" }}<|im_end|>
{% endfor %}<|im_start|>assistant
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("served"), names=(ONE,)) as it:
        yield it


@pytest.fixture(scope="module", params=[TOOLS_TEMPLATE, LLAMA_TEMPLATE, None])
def template(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Running]:
    """A model whose template writes tools as Hermes does, as Llama does, or not at all."""
    folder = tmp_path_factory.mktemp("template")
    made = copy(ONE, folder / "models" / "tools")
    if request.param is not None:
        (made / "chat_template.jinja").write_text(request.param)
    with running(folder, names=(), start="tools") as it:
        yield it


@pytest.mark.parametrize("choice", ["required", NAMED, ALLOWED])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_required(template: Running, choice: Any, stream: bool) -> None:
    pytest.importorskip("llguidance")
    body = {
        "messages": ASK,
        "tools": [tool()],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_tokens": 250,
        "temperature": 0,
    }
    if stream:
        chunks = [it["choices"][0] for it in template.events(CHAT, **body)[:-1]]
        deltas = [call for it in chunks for call in it["delta"].get("tool_calls", ())]
        assert {it["index"] for it in deltas} == {0}
        name = deltas[0]["function"]["name"]
        arguments = "".join(it["function"]["arguments"] for it in deltas)
        finish = chunks[-1]["finish_reason"]
    else:
        (made,) = template.post(CHAT, **body).json()["choices"]
        (call,) = made["message"]["tool_calls"]
        assert made["message"]["content"] is None
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        finish = made["finish_reason"]
    assert name == "get_weather"
    assert json.loads(arguments)["city"] in ("Paris", "Rome")
    assert finish == "tool_calls"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("other")], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": "force"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": [tool()], "grammar": 'root ::= "x"'}, "grammar"),
        (
            {
                "tools": [tool(parameters={"type": "object", "not": {}})],
                "tool_choice": "required",
            },
            "tool_choice",
        ),
    ],
)
def test_a_call_that_cannot_be_made_is_refused(
    served: Running, fields: dict[str, Any], param: str
) -> None:
    answer = served.chat(**fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_a_reply_is_a_call_or_has_the_form_that_is_asked_for(template: Running) -> None:
    """As agents with an output type ask for it."""
    pytest.importorskip("llguidance")
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["done"]}}}
    body = {"tools": [tool()], "response_format": form, "max_tokens": 250}
    for seed in range(4):
        (made,) = template.chat(**body, seed=seed).json()["choices"]
        if made["finish_reason"] == "tool_calls":
            assert made["message"]["content"] is None
        elif made["finish_reason"] == "stop":
            assert made["message"]["content"] == '"done"'
    body["parallel_tool_calls"] = False
    required = template.chat(**body, tool_choice="required", seed=1).json()["choices"][0]
    assert required["message"]["tool_calls"]


def test_a_template_without_tools_has_them_in_the_system_message(served: Running) -> None:
    def count(messages: list[dict[str, Any]], **body: Any) -> int:
        answer = served.post(CHAT, messages=messages, max_tokens=1, **body)
        assert answer.status_code == 200, answer.text
        tokens: int = answer.json()["usage"]["prompt_tokens"]
        return tokens

    ask = [{"role": "user", "content": "a"}]
    small = tool(description="", parameters=None)
    small["function"].pop("parameters")
    assert count(ask, tools=[small]) > count(ask) + 100
    assert count(ask, tools=[small], tool_choice="none") == count(ask)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    before = [*ask, {"role": "assistant", "content": None, "tool_calls": [call]}]
    answers = [{"role": "tool", "tool_call_id": "a", "content": it} for it in ("sun", "rain")]
    plain = [*ask, {"role": "assistant", "content": ""}]
    assert count([*before, *answers]) > count([*plain, *ask]) + 20
    assert count([*before, *answers, *ask]) > count([*before, *answers])


def test_one_call_at_a_time_ends_the_reply_after_it(tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    with running(tmp_path, names=(ONE,), loads=Scripted(f"{call}\n{call}")) as served:
        both = served.chat(tools=[tool("now")]).json()["choices"][0]["message"]
        assert len(both["tool_calls"]) == 2
        one = served.chat(tools=[tool("now")], parallel_tool_calls=False)
        assert len(one.json()["choices"][0]["message"]["tool_calls"]) == 1
        assert served.chat(parallel_tool_calls=False).status_code == 200


def test_a_call_that_is_cut_off_says_so(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    with running(tmp_path, names=(ONE,)) as served:
        body = {"tools": [tool()], "tool_choice": NAMED, "temperature": 0}
        whole = served.chat(**body, max_tokens=250).json()
        tokens = whole["usage"]["completion_tokens"]
        cut = served.chat(**body, max_tokens=tokens - 16).json()["choices"][0]
        assert cut["finish_reason"] == "length"
        (call,) = cut["message"]["tool_calls"]
        (right,) = whole["choices"][0]["message"]["tool_calls"]
        assert right["function"]["arguments"].startswith(call["function"]["arguments"])


def test_a_strict_function_is_kept_to_once_it_is_called(served: Running) -> None:
    """The reply is free until it opens a call, which is then kept to its schema."""
    pytest.importorskip("llguidance")
    prompt = served.chat(tools=[tool(strict=True)], max_tokens=5, temperature=0).json()
    assert prompt["choices"][0]["message"]["content"], "no call is made where none is opened"
    bad = tool(strict=True, parameters={"type": "object", "not": {}})
    assert served.chat(tools=[bad]).status_code == 400
    assert served.chat(tools=[tool(parameters={"type": "object", "not": {}})]).status_code == 200


CALL_TEXT = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
CALLS: list[tuple[str, list[tuple[str, Any]]]] = [
    ('{"name": "f", "arguments": {"a": "}</tool_call>{"}}', [("f", {"a": "}</tool_call>{"})]),
    ('{"name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})]),
    ('{"arguments": {"a": [1, {}]}, "name": "f"}', [("f", {"a": [1, {}]})]),
    ('[{"name": "f"}, {"name": "g", "arguments": null}]', [("f", {}), ("g", {})]),
    ('{"name": "f", "arguments": {"a": "x\ny"}}', [("f", {"a": "x\ny"})]),
    ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [("f", {"a": 1})]),
    ('{"name": "f"}\n{"name": "g", "arguments": {}}', [("f", {}), ("g", {})]),
    ('{"type": "function", "function": {"name": "f", "arguments": {}}}', [("f", {})]),
    ('{"arguments": {"a": 1e400}, "name": "f"}', [("f", {"a": None})]),
    ('{"name": "f", "params": {"a": 1}}', [("f", {"a": 1})]),
    ('{"name": "f", "a": 1, "b": [2]}', [("f", {"a": 1, "b": [2]})]),
    ('{"id": "c1", "index": 0, "name": "f", "type": "function"}', [("f", {})]),
    ('```json\n{"name": "f", "arguments": {"a": 1}}\n```', [("f", {"a": 1})]),
    ("f\n<arg_key>a</arg_key>\n<arg_value>Paris</arg_value>", [("f", {"a": "Paris"})]),
    ("<function=f>\n<parameter=a>\n3\n</parameter>\n</function>", [("f", {"a": 3})]),
]


@pytest.mark.parametrize(("inside", "calls"), CALLS)
@given(data=st.data())
def test_calls_are_read_as_small_models_write_them(
    inside: str, calls: list[tuple[str, Any]], data: st.DataObject
) -> None:
    text = f"<tool_call>{inside}</tool_call>"
    size = data.draw(st.integers(1, len(text)))
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    plain, parsed = read(HermesToolParser(), pieces)
    assert plain == ""
    assert [(name, json.loads(arguments)) for name, arguments in parsed] == calls


@pytest.mark.parametrize("rest", ["\n<tool", "\n<tool_call>", '\n<tool_call>\n{"na', "\n<"])
def test_a_call_that_is_cut_off_after_others_is_no_text(rest: str) -> None:
    plain, calls = read(HermesToolParser(), [f"{CALL_TEXT}{rest}"])
    assert (plain.strip(), [name for name, _ in calls]) == ("", ["f"])
    alone, none = read(HermesToolParser(), [rest])
    assert (alone, none) == (rest, []), "where nothing was called, nothing is lost"
    plain, _ = read(HermesToolParser(), [f"{CALL_TEXT}\nDone < all."])
    assert plain == "Done < all."


@pytest.mark.parametrize(
    ("text", "plain", "names"),
    [
        ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": 1}}', "", "fg"),
        ('[{"name": "f", "parameters": {}}]', "", "f"),
        ('f{"a": 1}', "", "f"),
        ('f[ARGS]{"a": 1}g[ARGS]{}', "", "fg"),
        ("f is a letter", None, ""),
        ("fg", None, ""),
        ('{"name": "stranger", "parameters": {}}', None, ""),
        ('say {"name": "f", "parameters": {}}', None, ""),
    ],
)
def test_bare_calls_are_of_functions_that_were_offered(
    text: str, plain: str | None, names: str
) -> None:
    for size in (1, 7, len(text)):
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        parsed, calls = read(BareToolParser(frozenset("fg")), pieces)
        assert parsed == (text if plain is None else plain)
        assert "".join(name for name, _ in calls) == names


JOINED = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}{{ "~" + call.function.arguments }}
{%- endfor %}<|im_end|>
{% endfor %}{{ tools or "" }}<|im_start|>assistant
"""


def test_a_template_that_joins_arguments_gets_them_as_text(tmp_path: Path) -> None:
    """As DeepSeek's do; others go through what the arguments are."""
    folder = copy(ONE, tmp_path / "models" / "joined")
    (folder / "chat_template.jinja").write_text(JOINED)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "b"},
    ]
    with running(tmp_path, names=(), start="joined") as served:
        answer = served.post(CHAT, messages=messages, max_tokens=1)
        assert answer.status_code == 200, answer.text
