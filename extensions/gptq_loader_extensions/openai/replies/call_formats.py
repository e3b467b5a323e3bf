"""How the models of a family mark a call, by its template, beside the way of Hermes and Qwen.

Each is written again as Hermes does, so that one parser reads them all as they come:
`<tool_call>{"name": NAME, "arguments": {...}}</tool_call>`.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.chat.marks import overlap

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CALL_FORMATS", "CallFormat", "CallTranslator", "find_format"]

OPEN, CLOSE = "<tool_call>\n", "\n</tool_call>"
# DeepSeek's marks are in fullwidth bars, with a lower eighth block for each space.
DS_CALLS, DS_CALLS_END, DS_CALL, DS_CALL_END, DS_SEP = (
    "<\uff5c{}\uff5c>".format(name.replace(" ", "\u2581"))
    for name in (
        "tool calls begin",
        "tool calls end",
        "tool call begin",
        "tool call end",
        "tool sep",
    )
)
# NAME, then what separates it from the object of its arguments.
DEEPSEEK = re.compile(
    rf"\s*(?:function{DS_SEP})?(?P<name>[\w.-]+)(?:{DS_SEP}|\s*\n```json)\s*(?=\{{)"
)
KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
KIMI = re.compile(
    rf"\s*(?:functions\.)?(?P<name>[\w.-]+?)(?::\d+)?\s*{re.escape(KIMI_ARGUMENTS)}\s*(?=\{{)"
)
INVOKE = re.compile(r'<invoke name="?([^">]+)"?>(.*?)</invoke>', re.DOTALL)
INVOKE_PARAMETER = re.compile(r'<parameter name="?([^">]+)"?>(.*?)</parameter>', re.DOTALL)


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How a family marks a call.

    Attributes:
        opening: what comes before each, or before several in a list of JSON.
        closing: what comes after it.
        around: what comes before the first and after the last, and is no text.
        head: a name and what separates it from its arguments; None where both are in JSON, or in
            what `_as_json` understands.
        tokens: those that stand for these marks, though a text may lack them.
    """

    opening: str
    closing: str
    around: tuple[str, ...] = ()
    head: re.Pattern[str] | None = None
    more_tokens: tuple[str, ...] = ()

    @property
    def tokens(self) -> tuple[str, ...]:
        """The texts of the tokens that are to be seen."""
        return (self.opening, self.closing, *self.around, *self.more_tokens)


CALL_FORMATS = (
    CallFormat(DS_CALL, DS_CALL_END, (DS_CALLS, DS_CALLS_END), DEEPSEEK, (DS_SEP,)),
    CallFormat(
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        KIMI,
        (KIMI_ARGUMENTS,),
    ),
    CallFormat("<seed:tool_call>", "</seed:tool_call>"),
    CallFormat("<minimax:tool_call>", "</minimax:tool_call>"),
    CallFormat("<TOOLCALL>", "</TOOLCALL>"),  # Nemotron
    CallFormat("<tool_calls>", "</tool_calls>"),  # Apriel, Jamba
    CallFormat("<|START_ACTION|>", "<|END_ACTION|>"),  # Command R7B and A
    CallFormat("<|tool_call_start|>", "<|tool_call_end|>"),  # LFM 2, as Python
    CallFormat("<|tool_call|>", "<|/tool_call|>"),  # Phi-4-mini; Granite, without its end
    CallFormat("<|action_start|><|plugin|>", "<|action_end|>"),  # InternLM 2
)


def find_format(template: str) -> CallFormat | None:
    """Return how a template marks calls; None where it is none of these."""
    return next((it for it in CALL_FORMATS if it.opening in template), None)


class CallTranslator:
    """Write the calls of a reply that comes in chunks as Hermes would.

    Args:
        form: how they are marked.
    """

    def __init__(self, form: CallFormat) -> None:
        self._form = form
        self._held = ""
        self._inside = False
        self._begun = False  # whether the call's name was written, and its arguments follow

    def feed(self, text: str) -> str:
        """Feed a chunk; return what is certain."""
        self._held += text
        return "".join(self._translated())

    def finish(self) -> str:
        """Return what was held back, at the reply's end; the last call's end may be missing."""
        held, self._held = self._held, ""
        if not self._inside:
            return held
        self._inside = False
        if self._begun:
            return f"{_without_fence(held)}}}{CLOSE}"
        return self._whole(held) or self._form.opening + held

    def _translated(self) -> Iterator[str]:
        while True:
            if not self._inside:
                yield self._text()
                if not self._inside:
                    return
            before, closed, after = self._held.partition(self._form.closing)
            head = self._form.head.match(before) if self._form.head and not self._begun else None
            if head is not None:
                self._begun = True
                yield f'{OPEN}{{"name": {json.dumps(head["name"])}, "arguments": '
                self._held = self._held[head.end() :]
                continue
            if not closed:
                yield self._arguments()
                return
            if self._begun:
                yield f"{_without_fence(before)}}}{CLOSE}"
            else:
                yield self._whole(before) or self._form.opening + before + self._form.closing
            self._held, self._inside, self._begun = after, False, False

    def _text(self) -> str:
        """Return what comes before the next call, without what is around the calls."""
        for mark in self._form.around:
            self._held = self._held.replace(mark, "")
        before, opened, after = self._held.partition(self._form.opening)
        if opened:
            self._held, self._inside = after, True
            return before
        marks = (self._form.opening, *self._form.around)
        keep = max(overlap(before, mark) for mark in marks)
        self._held = before[len(before) - keep :]
        return before[: len(before) - keep]

    def _arguments(self) -> str:
        """Return more of a call's arguments, but what may end them."""
        if not self._begun:
            return ""
        keep = max(overlap(self._held, mark) for mark in (self._form.closing, "\n```"))
        keep = max(keep, len(self._held) - len(self._held.rstrip("`\n ")))
        cut = len(self._held) - keep
        sent, self._held = self._held[:cut], self._held[cut:]
        return sent

    def _whole(self, content: str) -> str:
        """Write calls that are complete; "" where they are none."""
        calls = _as_json(content)
        return "\n".join(f"{OPEN}{call}{CLOSE}" for call in calls)


def _without_fence(text: str) -> str:
    return text.rstrip().removesuffix("```").rstrip()


def _as_json(content: str) -> list[str]:
    """Return the calls in what stands between marks, each as Hermes writes it."""
    stripped = content.strip()
    if "<function=" in stripped:
        return [stripped]
    if "<invoke " in stripped:
        return [
            _write(name, {key: _value(value) for key, value in INVOKE_PARAMETER.findall(body)})
            for name, body in INVOKE.findall(stripped)
        ]
    try:
        parsed = json.loads(stripped, strict=False)
    except (ValueError, RecursionError):
        return _from_python(stripped)
    return [
        _write(str(name), arguments)
        for call in (parsed if isinstance(parsed, list) else [parsed])
        if isinstance(call, dict)
        and (name := call.get("name") or call.get("tool_name"))
        and isinstance(arguments := call.get("arguments", call.get("parameters", {})), dict | str)
    ]


def _from_python(text: str) -> list[str]:
    """Return the calls of a list in Python: [now(zone="UTC")]."""
    try:
        tree = ast.parse(text, mode="eval").body
        calls = tree.elts if isinstance(tree, ast.List) else [tree]
        return [
            _write(
                ast.unparse(call.func),
                {str(it.arg): ast.literal_eval(it.value) for it in call.keywords},
            )
            for call in calls
            if isinstance(call, ast.Call) and not call.args
        ]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []


def _write(name: str, arguments: object) -> str:
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
