"""Calls as each family marks them, read as they come, and by a real model's tokens."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parrot import TEMPLATE, parrot
from served import running

from gptq_loader_extensions.openai.replies.call_formats import (
    CALL_FORMATS,
    DS_CALL,
    DS_CALL_END,
    DS_CALLS,
    DS_CALLS_END,
    DS_SEP,
    CallTranslator,
    find_format,
)
from gptq_loader_extensions.openai.replies.tool_parsers import (
    CallBegin,
    CallText,
    HermesToolParser,
    TranslatedToolParser,
)

if TYPE_CHECKING:
    from pathlib import Path

ARGUMENTS = '{"zone": "UTC", "deep": {"a": [1, "}"]}}'
CALLS = [("now", json.loads(ARGUMENTS))]
TWICE = CALLS * 2
JSON = f'{{"name": "now", "arguments": {ARGUMENTS}}}'
WRITTEN = {
    "DeepSeek R1": (
        f"{DS_CALLS}{DS_CALL}function{DS_SEP}now\n```json\n{ARGUMENTS}\n```{DS_CALL_END}\n"
        f"{DS_CALL}function{DS_SEP}now\n```json\n{ARGUMENTS}\n```{DS_CALL_END}{DS_CALLS_END}",
        TWICE,
    ),
    "DeepSeek V3.1": (
        f"{DS_CALLS}{DS_CALL}now{DS_SEP}{ARGUMENTS}{DS_CALL_END}{DS_CALLS_END}",
        CALLS,
    ),
    "Kimi K2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.now:0"
        f"<|tool_call_argument_begin|>{ARGUMENTS}<|tool_call_end|><|tool_calls_section_end|>",
        CALLS,
    ),
    "Seed-OSS": (
        "<seed:tool_call>\n<function=now>\n<parameter=zone>UTC</parameter>\n</function>\n"
        "</seed:tool_call>",
        [("now", {"zone": "UTC"})],
    ),
    "MiniMax M2": (
        '<minimax:tool_call>\n<invoke name="now">\n<parameter name="zone">UTC</parameter>\n'
        '<parameter name="n">2</parameter>\n</invoke>\n</minimax:tool_call>',
        [("now", {"zone": "UTC", "n": 2})],
    ),
    "Nemotron": (f"<TOOLCALL>[{JSON}, {JSON}]</TOOLCALL>", TWICE),
    "Apriel": (f"<tool_calls>[{JSON}]</tool_calls>", CALLS),
    "Command A": (
        f'<|START_ACTION|>[\n{{"tool_call_id": "0", "tool_name": "now", "parameters": {ARGUMENTS}}}'
        "\n]<|END_ACTION|>",
        CALLS,
    ),
    "LFM 2": (
        "<|tool_call_start|>[now(zone='UTC', n=2)]<|tool_call_end|>",
        [("now", {"zone": "UTC", "n": 2})],
    ),
    "Phi-4-mini": (f"<|tool_call|>[{JSON}]<|/tool_call|>", CALLS),
    "Granite": (f"<|tool_call|>[{JSON}]", CALLS),
    "InternLM 2": (f"<|action_start|><|plugin|>\n{JSON}<|action_end|>", CALLS),
}


def read(text: str, cuts: list[int]) -> tuple[str, list[tuple[str, object]]]:
    form = find_format(text)
    assert form is not None
    parser = TranslatedToolParser(CallTranslator(form), HermesToolParser())
    edges = sorted({0, len(text), *(it % len(text) for it in cuts)})
    events = [it for a, b in pairwise(edges) for it in parser.feed(text[a:b])] + parser.finish()
    plain = "".join(it for it in events if isinstance(it, str))
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, CallBegin):
            calls.append([event.name, ""])
        elif isinstance(event, CallText):
            calls[-1][1] += event.arguments
    return plain.strip(), [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("family", WRITTEN)
@given(st.lists(st.integers(0, 400), max_size=6))
@settings(deadline=None, max_examples=40)
def test_calls_are_read_however_the_text_is_cut(family: str, cuts: list[int]) -> None:
    text, calls = WRITTEN[family]
    assert read(text, cuts) == ("", calls)
    assert read(f"Let me see.\n{text}", cuts) == ("Let me see.", calls)


@pytest.mark.parametrize("form", CALL_FORMATS, ids=lambda it: it.opening)
def test_what_is_no_call_is_text(form: object) -> None:
    for text in (f"a < b {form.opening[:3]} c", f"{form.opening}no call{form.closing}"):  # type: ignore[attr-defined]
        parser = TranslatedToolParser(CallTranslator(form), HermesToolParser())  # type: ignore[arg-type]
        events = [*(it for letter in text for it in parser.feed(letter)), *parser.finish()]
        assert "".join(it for it in events if isinstance(it, str)) == text


def test_a_call_whose_marks_are_special_tokens(tmp_path: Path) -> None:
    special = (DS_CALLS, DS_CALL, DS_SEP, DS_CALL_END, DS_CALLS_END)
    template = f"{{% if tools %}}{DS_CALL}{{{{ tools | tojson }}}}{{% endif %}}" + TEMPLATE
    pieces = ("Let me see.", DS_CALLS, DS_CALL, "now", DS_SEP, '{"zone"', ': "UTC"}', DS_CALL_END,
              DS_CALLS_END)  # fmt: skip
    parrot(tmp_path / "models" / "caller", pieces, template=template, special=special)
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    with running(tmp_path, names=(), start="caller") as served:
        whole = served.chat(temperature=0, tools=[tool]).json()["choices"][0]
        assert whole["finish_reason"] == "tool_calls"
        assert whole["message"]["content"] == "Let me see."
        (call,) = whole["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": '{"zone": "UTC"}'}
