"""Requests with the very fields that coding agents send by default, their long texts left out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE, copy, edit_json
from served import Running, running
from test_server_parts import Scripted

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PARAMETERS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": "The file."},
        "offset": {"type": "integer", "minimum": 0, "maximum": 9007199254740991},
        "limit": {"type": "integer", "minimum": -9007199254740991, "exclusiveMinimum": 0},
    },
    "required": ["path"],
    "additionalProperties": False,
}
CALL = '<tool_call>\n{"name": "read", "arguments": {"path": "a"}}\n</tool_call>'
TOOL = {"type": "function", "function": {"name": "read", "parameters": PARAMETERS}}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}
SYSTEM, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Read a."}
PARTS = {"role": "user", "content": [{"type": "text", "text": "Read a."}]}
TEXT = {"type": "input_text", "text": "Read a."}
CODEX: dict[str, Any] = {
    "stream": True,
    "input": [
        {"type": "message", "role": "developer", "content": [TEXT, TEXT]},
        {"type": "message", "role": "user", "content": [TEXT]},
    ],
    "tools": [
        {"type": "function", "name": "read", "strict": False, "parameters": PARAMETERS},
        {"type": "namespace", "name": "multi_agent_v1", "description": "It.", "tools": []},
        {"type": "web_search"},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "01a22bcf-d3f0-7f62-ba9b-442ed3f893c2",
    "client_metadata": {"session_id": "01a22bcf"},
}
CLAUDE: dict[str, Any] = {
    "max_tokens": 400,
    "stream": True,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: it"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [PARTS, {"role": "system", "content": "The date is known."}],
    "tools": [{"name": "read", "description": "It.", "input_schema": PARAMETERS}],
    "metadata": {"user_id": '{"session_id":"30c60a79"}'},
    "thinking": {"type": "adaptive"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
}
TITLE = {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]}
CHATS: dict[str, dict[str, Any]] = {
    "opencode": {"max_tokens": 400, "messages": [SYSTEM, ASK], "tool_choice": "auto"},
    "cline": {"messages": [SYSTEM, ASK], "tool_choice": "auto"},
    "pi": {"messages": [SYSTEM, PARTS], "store": False, "max_completion_tokens": 400},
    "qwen": {
        "messages": [SYSTEM, PARTS, {"role": "assistant", "content": "Got it."}, PARTS],
        "max_tokens": 400,
    },
}


def roomy(folder: Path) -> str:
    """Put a checkpoint with room for what agents say of their tools into a models folder."""
    made = copy(ONE, folder / "models" / "roomy")
    edit_json(made / "config.json", lambda it: it.update(max_position_embeddings=4096))
    return made.name


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose model calls the tool in every reply."""
    folder = tmp_path_factory.mktemp("served")
    with running(folder, names=(), start=roomy(folder), loads=Scripted(CALL)) as it:
        yield it


def test_codex_is_sent_a_call(served: Running) -> None:
    events = served.events("/v1/responses", **CODEX)
    assert [it["type"] for it in events][:2] == ["response.created", "response.in_progress"]
    (item,) = [it["item"] for it in events if it["type"] == "response.output_item.done"]
    assert (item["type"], item["name"], item["arguments"]) == (
        "function_call",
        "read",
        '{"path": "a"}',
    )
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["usage"]["input_tokens"] > 0
    thought: dict[str, Any] = {"type": "reasoning", "summary": [], "encrypted_content": None}
    output = {"type": "function_call_output", "call_id": item["call_id"], "output": "text of a"}
    again = {**CODEX, "input": [*CODEX["input"], thought, item, output]}
    assert served.events("/v1/responses", **again)[-1]["type"] == "response.completed"


def test_claude_code_is_sent_a_call(served: Running) -> None:
    assert served.client.head("/").status_code in (200, 405)
    events = served.events("/v1/messages?beta=true", **CLAUDE)
    blocks = [it["content_block"] for it in events if it["type"] == "content_block_start"]
    assert [(it["type"], it["name"]) for it in blocks] == [("tool_use", "read")]
    parts = [it["delta"].get("partial_json", "") for it in events if "delta" in it]
    assert json.loads("".join(parts)) == {"path": "a"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    result = {
        "type": "tool_result",
        "tool_use_id": blocks[0]["id"],
        "content": "text of a",
        "cache_control": {"type": "ephemeral"},
    }
    call = {**blocks[0], "input": {"path": "a"}}
    answered = [*CLAUDE["messages"], {"role": "assistant", "content": [call]}]
    answered.append({"role": "user", "content": [result]})
    again = served.events("/v1/messages?beta=true", **{**CLAUDE, "messages": answered})
    assert again[-1]["type"] == "message_stop"


@pytest.mark.parametrize("agent", CHATS)
def test_other_agents_are_sent_a_call(served: Running, agent: str) -> None:
    events = served.events("/v1/chat/completions", **CHATS[agent], **STREAM, tools=[TOOL])
    assert events[-1] == "[DONE]"
    assert events[-2]["usage"]["completion_tokens"] > 0
    choices = [choice for it in events[:-1] for choice in it["choices"]]
    calls = [call for it in choices for call in it["delta"].get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "read"
    assert json.loads("".join(it["function"]["arguments"] for it in calls)) == {"path": "a"}
    assert choices[-1]["finish_reason"] == "tool_calls"


def test_claude_code_is_sent_a_title(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Which it asks for beside each first question, in a form."""
    pytest.importorskip("llguidance")
    form = {"effort": "high", "format": {"type": "json_schema", "schema": TITLE}}
    body = {**CLAUDE, "tools": [], "output_config": form, "max_tokens": 60}
    del body["thinking"], body["context_management"]
    folder = tmp_path_factory.mktemp("title")
    with running(folder, names=(), start=roomy(folder)) as served:
        events = served.events("/v1/messages", **body)
    text = "".join(it["delta"].get("text", "") for it in events if "delta" in it)
    assert text.startswith('{"title": "')
