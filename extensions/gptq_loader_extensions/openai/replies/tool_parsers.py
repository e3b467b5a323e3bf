"""Parse the calls in what a model writes, and send them on as they are written."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gptq_loader_extensions.openai.replies.call_text import BETWEEN, parse_calls
from gptq_loader_plugin.chat.marks import overlap

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from gptq_loader_extensions.openai.replies.call_formats import CallTranslator

__all__ = [
    "CLOSE",
    "OPEN",
    "BareToolParser",
    "CallBegin",
    "CallText",
    "HermesToolParser",
    "NoToolParser",
    "ToolEvent",
    "ToolParser",
    "TranslatedToolParser",
    "new_call_id",
]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*"'
# The beginning of a call as every template asks for it: what follows are the arguments.
HEAD = re.compile(
    rf'\s*\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"(?:name|function)"\s*:\s*(?P<name>{STRING})\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*\{'
)
# Of Mistral since 2025: NAME{...}; [ARGS] is a token that may be shown.
NAMED = re.compile(r"\s*(?P<name>[\w.-]+)\s*(?:\[ARGS\])?\s*\{")
NAME = re.compile(r"[\w.-]+")


def new_call_id() -> str:
    """Return what the answer to a call refers to."""
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(frozen=True, slots=True)
class CallBegin:
    """A call begins.

    Attributes:
        name: the function's.
    """

    name: str


@dataclass(frozen=True, slots=True)
class CallText:
    """More of the arguments of the call that began last.

    Attributes:
        arguments: JSON, or a part of it.
    """

    arguments: str


ToolEvent = str | CallBegin | CallText  # text that is in no call, or of a call


class ToolParser(Protocol):
    """Separate a reply's text from the calls in it."""

    def feed(self, text: str) -> list[ToolEvent]:
        """Feed a chunk; return the text that is in no call, and what is known of calls."""
        ...

    def finish(self) -> list[ToolEvent]:
        """Return what was held back, at the reply's end."""
        ...


class NoToolParser:
    """All of a reply is text."""

    def feed(self, text: str) -> list[ToolEvent]:
        """Return the chunk as it is."""
        return [text] if text else []

    def finish(self) -> list[ToolEvent]:
        """Return nothing: nothing was held back."""
        return []


@dataclass(slots=True)
class JsonObject:
    """An object of JSON that comes in chunks, from after its first brace to its last."""

    depth: int = 1
    in_string: bool = False
    escaped: bool = False

    def add(self, text: str) -> tuple[str, str]:
        """Return what of a text is of the object, and the rest once it has ended.

        A control character in a string is escaped, as JSON has it and small models do not.
        """
        written = []
        for i, letter in enumerate(text):
            if self.in_string and letter < " ":
                written.append(json.dumps(letter)[1:-1])
                continue
            written.append(letter)
            if self.in_string:
                self.in_string = self.escaped or letter != '"'
                self.escaped = letter == "\\" and not self.escaped
            elif letter == '"':
                self.in_string = True
            elif letter in "{[":
                self.depth += 1
            elif letter in "}]":
                self.depth -= 1
                if not self.depth:
                    return "".join(written), text[i + 1 :]
        return "".join(written), ""

    @property
    def ended(self) -> bool:
        """Whether its last brace has come."""
        return not self.depth


@dataclass(slots=True)
class HermesToolParser:
    """Calls between `<tool_call>` and `</tool_call>`.

    As Hermes and Qwen write them, in JSON; or as GLM and Qwen3-Coder do, in tags.

    Attributes:
        single: whether what comes after the first call is left out.
    """

    single: bool = False
    _held: str = ""
    _arguments: JsonObject | None = None  # of the call whose arguments are being sent
    _calls: int = 0
    _after_call: bool = False  # whose newline is no text

    def feed(self, text: str) -> list[ToolEvent]:
        """Feed a chunk; hold back what may be the beginning of a call."""
        self._held += text
        return list(self._events())

    def finish(self) -> list[ToolEvent]:
        """Return a call whose end is missing, where it can be parsed, else the text."""
        held, self._held = self._held, ""
        if self._arguments is not None or self._is_over():
            return []
        if not held.startswith(OPEN):
            begins = self._calls > 0 and bool(held) and OPEN.startswith(held.strip())
            return [held] if held and not begins else []
        calls = list(parse_calls(held.removeprefix(OPEN)))
        if not calls and self._calls:  # another one, cut off before it says anything
            return []
        self._calls += len(calls)
        return _call_events(calls[:1] if self.single else calls) or [held]

    def _is_over(self) -> bool:
        return self.single and self._calls > 0 and self._arguments is None

    def _events(self) -> Iterator[ToolEvent]:
        while True:
            if self._is_over():
                self._held = ""
                return
            if self._arguments is not None:
                if not (yield from self._send_arguments(self._arguments)):
                    return
                continue
            if self._after_call:
                self._held = self._held.lstrip("\n")
                self._after_call = not self._held
            at = self._held.find(OPEN)
            if at < 0:
                keep = overlap(self._held, OPEN)
                plain, self._held = _cut(self._held, len(self._held) - keep)
                if plain:
                    yield plain
                return
            plain, self._held = _cut(self._held, at)
            if plain:
                yield plain
            if not (yield from self._begin_call()):
                return

    def _begin_call(self) -> Generator[ToolEvent, None, bool]:
        """Send the first of a call, or all of it; return whether more can be read."""
        inside, close, after = self._held[len(OPEN) :].partition(CLOSE)
        if head := HEAD.match(inside):
            self._calls += 1
            self._arguments = JsonObject()
            self._held = self._held[len(OPEN) + head.end() :]
            yield CallBegin(json.loads(head["name"]))
            yield CallText("{")
            return True
        if not close:
            return False
        calls = list(parse_calls(inside))
        self._calls += len(calls)
        yield from _call_events(calls[:1] if self.single else calls) or [OPEN + inside + CLOSE]
        self._after_call = bool(calls)
        self._held = after
        return True

    def _send_arguments(self, arguments: JsonObject) -> Generator[ToolEvent, None, bool]:
        """Send more of a call's arguments; return whether more can be read."""
        if not arguments.ended:
            more, self._held = arguments.add(self._held)
            if more:
                yield CallText(more)
        _, close, after = self._held.partition(CLOSE)
        if not arguments.ended or not close:
            return False
        self._held, self._arguments, self._after_call = after, None, True
        return True


@dataclass(slots=True)
class TranslatedToolParser:
    """Calls that a family marks in its own way, or as Hermes does.

    Attributes:
        translator: writes them as Hermes does.
        parser: reads those.
    """

    translator: CallTranslator
    parser: HermesToolParser

    def feed(self, text: str) -> list[ToolEvent]:
        """Feed a chunk; hold back what may be the beginning of a call."""
        return self.parser.feed(self.translator.feed(text))

    def finish(self) -> list[ToolEvent]:
        """Return a call whose end is missing, where it can be parsed, else the text."""
        return self.parser.feed(self.translator.finish()) + self.parser.finish()


@dataclass(slots=True)
class BareToolParser:
    """Calls with nothing around them: a reply that is JSON and nothing else.

    As Llama 3 writes them, and Mistral and Phi, whose marks are tokens that are never shown; or,
    as later ones of Mistral's, a function's name and JSON behind it.

    Attributes:
        names: the functions that may be called; JSON that names no other is text.
        single: whether what comes after the first call is left out.
    """

    names: frozenset[str]
    single: bool = False
    _held: str = ""
    _plain: bool = False
    _arguments: JsonObject | None = None
    _is_named: bool = False  # whether the name of that call stands before its arguments
    _calls: int = 0

    def feed(self, text: str) -> list[ToolEvent]:
        """Hold everything back while it may be a call."""
        self._held += text
        return list(self._events())

    def finish(self) -> list[ToolEvent]:
        """Return the calls, or the text that turned out to be none."""
        held, self._held = self._held, ""
        if self._arguments is not None:
            return []
        calls = [call for call in parse_calls(held) if call[0] in self.names]
        if calls and not (self.single and self._calls):
            return _call_events(calls[:1] if self.single else calls)
        return [held] if held and not self._calls else []

    def _events(self) -> Iterator[ToolEvent]:
        while True:
            if self._arguments is not None:
                if not self._arguments.ended:
                    more, self._held = self._arguments.add(self._held)
                    if more:
                        yield CallText(more)
                if not self._arguments.ended or not (self._is_named or "}" in self._held):
                    return
                rest = self._held if self._is_named else self._held.partition("}")[2]
                self._held = BETWEEN.sub("", rest, count=1)
                self._arguments = None
            begun = self._held.lstrip()
            if self._plain or not (self._calls or self._may_be_call(begun)):
                self._plain = True
                plain, self._held = self._held, ""
                if plain:
                    yield plain
                return
            held = BETWEEN.sub("", self._held, count=1)
            head = HEAD.match(held) or NAMED.match(held)
            if head is None or (self.single and self._calls):
                return
            name = json.loads(head["name"]) if head.re is HEAD else head["name"]
            if name not in self.names:
                return
            self._held, self._is_named = held[head.end() :], head.re is NAMED
            self._calls += 1
            self._arguments = JsonObject()
            yield CallBegin(name)
            yield CallText("{")

    def _may_be_call(self, begun: str) -> bool:
        """Return whether a reply may be a call by its beginning."""
        if not begun or begun.startswith(("{", "[")):
            return True
        name = NAME.match(begun)
        if name is None:
            return False
        if name[0] == begun:
            return any(it.startswith(begun) for it in self.names)
        return name[0] in self.names and begun[name.end() :].lstrip()[:1] in ("", "{", "[")


def _cut(text: str, at: int) -> tuple[str, str]:
    return text[:at], text[at:]


def _call_events(calls: list[tuple[str, str]]) -> list[ToolEvent]:
    events: list[ToolEvent] = []
    for name, arguments in calls:
        events += [CallBegin(name), CallText(arguments)]
    return events
