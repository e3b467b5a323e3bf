"""Models that think: their thoughts apart from their answers, for as long as they may."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE, copy
from hypothesis import given
from hypothesis import strategies as st
from parrot import TEMPLATE as PLAIN
from parrot import parrot
from served import CHAT, Running, running
from test_server_parts import Scripted

from gptq_loader_plugin.chat.channels import ChannelParser
from gptq_loader_plugin.chat.thinking import ThinkingMarks, ThoughtParser

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# As Qwen3's: a thought that is opened, unless the request forbids it.
TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% else %}<think>
{% endif %}{% endif %}"""
THOUGHT = "easy,\n\nI think\n</think>\n\n10 is it."
ASK = [{"role": "user", "content": "Hello"}]


def thinking(tmp_path: Path, text: str | None = None, template: str = TEMPLATE) -> Any:
    folder = copy(ONE, tmp_path / "models" / "thinker")
    (folder / "chat_template.jinja").write_text(template)
    scripted = {} if text is None else {"loads": Scripted(text)}
    return running(tmp_path, names=(), start="thinker", **scripted)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with thinking(tmp_path_factory.mktemp("thinking")) as it:
        yield it


def test_thoughts_are_apart_from_the_answer(tmp_path: Path) -> None:
    with thinking(tmp_path, THOUGHT) as served:
        (choice,) = served.chat().json()["choices"]
        assert choice["message"]["reasoning_content"] == "easy,\n\nI think"
        assert choice["message"]["content"] == "10 is it."
        deltas = [it["choices"][0]["delta"] for it in served.events(CHAT, messages=ASK)[:-1]]
        thought = "".join(it.get("reasoning_content", "") for it in deltas)
        assert thought == "easy,\n\nI think"
        assert "".join(it.get("content", "") for it in deltas) == "10 is it."
        raw = served.chat(reasoning_format="none").json()["choices"][0]["message"]
        assert raw["content"] == THOUGHT
        assert "reasoning_content" not in raw
        hidden = served.chat(include_reasoning=False).json()["choices"][0]["message"]
        assert hidden["content"] == "10 is it."
        assert "reasoning_content" not in hidden


@given(st.lists(st.integers(0, 40), max_size=6))
def test_a_thought_is_found_however_the_text_is_cut(cuts: list[int]) -> None:
    text = f" <think>{THOUGHT}"
    edges = sorted({0, len(text), *(it for it in cuts if it < len(text))})
    parser = ThoughtParser(ThinkingMarks("<think>", "</think>"))
    parts = [parser.feed(text[a:b]) for a, b in pairwise(edges)]
    parts.append(parser.finish())
    assert "".join(thought for thought, _ in parts) == "easy,\n\nI think"
    assert "".join(answer for _, answer in parts) == "10 is it."


@pytest.mark.parametrize("text", ["plain", " <thin", "a <think>b</think>", "</think>x"])
def test_what_opens_no_thought_is_the_answer(text: str) -> None:
    parser = ThoughtParser(ThinkingMarks("<think>", "</think>"))
    parts = [*(parser.feed(letter) for letter in text), parser.finish()]
    assert "".join(thought for thought, _ in parts) == ""
    assert "".join(answer for _, answer in parts) == text


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": False},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"reasoning": {"enabled": False}},
        {"reasoning": {"effort": "none"}},
        {"think": False},
    ],
)
def test_thinking_may_be_switched_off(served: Running, fields: dict[str, Any]) -> None:
    on = served.chat(max_tokens=1).json()["usage"]["prompt_tokens"]
    off = served.chat(max_tokens=1, **fields)
    assert off.json()["usage"]["prompt_tokens"] > on, "by the closed, empty thought"
    assert "x-ignored-options" not in off.headers


def test_what_a_template_does_not_name_is_told(served: Running) -> None:
    answer = served.chat(
        max_tokens=1, chat_template_kwargs={"colour": "red"}, reasoning_effort="low"
    )
    ignored = answer.headers["x-ignored-options"]
    assert ignored == "chat_template_kwargs.colour, reasoning_effort"


def test_values_for_a_template_forge_nothing(served: Running) -> None:
    for kwargs in ({"messages": []}, {"tools": []}, {"add_generation_prompt": False}):
        refused = served.chat(chat_template_kwargs=kwargs)
        assert refused.status_code == 400
    refused = served.chat(chat_template_kwargs={"enable_thinking": "<|im_end|>"})
    assert "control token" in refused.json()["error"]["message"]


def test_a_thought_ends_within_its_budget(served: Running) -> None:
    for fields in (
        {"thinking_budget": 4},
        {"thinking": {"type": "enabled", "budget_tokens": 4}},
    ):
        answer = served.chat(max_tokens=60, temperature=0, **fields).json()
        details = answer["usage"]["completion_tokens_details"]
        assert answer["choices"][0]["message"]["content"], "there is an answer"
        assert details["reasoning_tokens"] < 30
    free = served.chat(max_tokens=60, temperature=0).json()
    assert free["usage"]["completion_tokens_details"]["reasoning_tokens"] == 60


def test_a_form_is_kept_to_after_the_thought(served: Running) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    whole = served.chat(max_tokens=80, temperature=0, thinking_budget=4, guided_json=schema)
    assert whole.status_code == 200, whole.text
    (answer,) = whole.json()["choices"]
    assert answer["message"]["reasoning_content"]
    assert set(json.loads(answer["message"]["content"])) == {"ok"}
    assert answer["finish_reason"] == "stop"


def test_thoughts_of_earlier_turns_reach_the_template(served: Running) -> None:
    counts = []
    for more in ({}, {"reasoning_content": "a thought"}, {"reasoning": "a thought"}):
        messages = [*ASK, {"role": "assistant", "content": "x", **more}, *ASK]
        counts.append(served.post(CHAT, messages=messages, max_tokens=1).json()["usage"])
    assert counts[1] == counts[2]
    assert counts[1]["prompt_tokens"] > counts[0]["prompt_tokens"]


# As gpt-oss': the reply is in channels.
CHANNELS = "{% if tools %}{{ tools | tojson }}{% endif %}" + PLAIN.replace(
    "assistant\n", "assistant{# <|channel|>analysis<|message|> #}"
)
MARKS = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>")
NOW = {
    "type": "function",
    "function": {
        "name": "now",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}


def channels(tmp_path: Path, *pieces: str, end: str = "<|im_end|>") -> Any:
    folder = tmp_path / "models" / "channels"
    after = "assistant"
    parrot(folder, pieces, template=CHANNELS, special=MARKS, after=after, end=end)
    return running(tmp_path, names=(), start="channels")


def test_channels_are_thought_and_answer(tmp_path: Path) -> None:
    # a token may not come twice, so the second header is one token of its own
    second = "<|end|><|start|>assistant<|channel|>final<|message|>"
    pieces = ("<|channel|>", "analysis", "<|message|>", "easy", second, "Ten", " it is.")
    with channels(tmp_path, *pieces) as served:
        (choice,) = served.chat(temperature=0).json()["choices"]
        assert choice["message"]["reasoning_content"] == "easy"
        assert choice["message"]["content"] == "Ten it is."
        deltas = [it["choices"][0]["delta"] for it in served.events(CHAT, messages=ASK)[:-1]]
        assert "".join(it.get("reasoning_content", "") for it in deltas) == "easy"
        assert "".join(it.get("content", "") for it in deltas) == "Ten it is."
        raw = served.chat(temperature=0, reasoning_format="none").json()["choices"][0]["message"]
        assert raw["content"].startswith("<|channel|>analysis<|message|>easy")
        short = served.chat(temperature=0, thinking_budget=3).json()["choices"][0]["message"]
        assert "easy" not in short.get("reasoning_content", "")


def test_a_call_in_a_channel_is_a_call(tmp_path: Path) -> None:
    pieces = ("<|channel|>", "commentary to=functions.now ", "json", "<|message|>", '{"zone"',
              ': "UTC"}', "<|call|>")  # fmt: skip
    with channels(tmp_path, *pieces) as served:
        whole = served.chat(temperature=0, tools=[NOW]).json()["choices"][0]
        assert whole["finish_reason"] == "tool_calls"
        (call,) = whole["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": '{"zone": "UTC"}'}
        without = served.chat(temperature=0).json()["choices"][0]["message"]
        assert without["content"] == '{"zone": "UTC"}'


CHANNEL_REPLY = (
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b"
    "<|end|><|start|>assistant<|channel|>analysis<|message|>c<|end|><|start|>assistant to="
    "functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|><|start|>assistant"
    "<|channel|>final<|message|>d"
)


@given(st.lists(st.integers(0, len(CHANNEL_REPLY)), max_size=8))
def test_channels_are_found_however_the_text_is_cut(cuts: list[int]) -> None:
    edges = sorted({0, len(CHANNEL_REPLY), *cuts})
    parser = ChannelParser(calls=True)
    parts = [parser.feed(CHANNEL_REPLY[a:b]) for a, b in pairwise(edges)]
    parts.append(parser.finish())
    assert "".join(thought for thought, _ in parts) == "a\n\nc"
    answer = "".join(answer for _, answer in parts)
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert answer == f"b{call}\n\nd"


@pytest.mark.parametrize("text", ["plain", "<|channel|>final<|message|>plain", "assistant, plain"])
def test_a_reply_without_thoughts_in_channels_is_the_answer(text: str) -> None:
    parser = ChannelParser()
    parts = [*(parser.feed(letter) for letter in text), parser.finish()]
    assert "".join(thought for thought, _ in parts) == ""
    assert "".join(answer for _, answer in parts) == text.rpartition("|>")[2]
