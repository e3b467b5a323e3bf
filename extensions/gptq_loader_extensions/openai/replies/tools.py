"""Offer tools to templates that take them, and find the calls in what a model writes."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_plugin.chat.encode import control_tokens
from gptq_loader_plugin.chat.templates import JinjaTemplate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_extensions.openai.schema.schemas import ChatRequest
    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = [
    "Call",
    "CallReader",
    "PlainText",
    "TaggedCalls",
    "WholeCall",
    "offer_tools",
    "to_template",
]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
LLAMA_WORDS = '"parameters": dictionary'  # how Llama 3's templates ask for a call


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function that a model asked for.

    Attributes:
        name: the function's.
        arguments: as JSON.
        call_id: what the answer to it refers to.
    """

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_json(self) -> dict[str, Any]:
        """Give the call as OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class CallReader(Protocol):
    """Parts a reply into what it says and what it calls."""

    def add(self, text: str) -> tuple[str, list[Call]]:
        """Take a piece; give what is certainly said, and the calls that are complete."""
        ...

    def rest(self) -> tuple[str, list[Call]]:
        """Give what was held back, at the reply's end."""
        ...


class PlainText:
    """A reply is what it says."""

    def add(self, text: str) -> tuple[str, list[Call]]:
        """Give the piece as it is."""
        return text, []

    def rest(self) -> tuple[str, list[Call]]:
        """Nothing was held back."""
        return "", []


class TaggedCalls:
    """Calls as Hermes and Qwen write them: JSON between `<tool_call>` and `</tool_call>`."""

    def __init__(self) -> None:
        self._held = ""
        self._after_call = False  # whose line's end is no text

    def add(self, text: str) -> tuple[str, list[Call]]:
        """Take a piece; hold back what may be the beginning of a call."""
        self._held += text
        said = ""
        calls: list[Call] = []
        while True:
            if self._after_call:
                self._held = self._held.lstrip("\n")
                self._after_call = not self._held
            at = self._held.find(OPEN)
            if at < 0:
                keep = _overlap(self._held, OPEN)
                said += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                return said, calls
            said, self._held = said + self._held[:at], self._held[at:]
            inside, close, after = self._held[len(OPEN) :].partition(CLOSE)
            if not close:
                return said, calls
            call = _read_call(inside, "arguments")
            if call is None:
                said += OPEN + inside + CLOSE
            else:
                calls.append(call)
                self._after_call = True
            self._held = after

    def rest(self) -> tuple[str, list[Call]]:
        """Give a call whose end is missing, where it can be read, else the text."""
        held, self._held = self._held, ""
        call = _read_call(held.removeprefix(OPEN), "arguments") if held.startswith(OPEN) else None
        return ("", [call]) if call is not None else (held, [])


class WholeCall:
    """A call as Llama 3 writes it: a reply that is JSON and nothing else."""

    def __init__(self) -> None:
        self._held = ""
        self._plain = False

    def add(self, text: str) -> tuple[str, list[Call]]:
        """Hold everything back while it may be a call."""
        self._held += text
        if not self._plain and (not self._held.strip() or self._held.lstrip().startswith("{")):
            return "", []
        self._plain = True
        said, self._held = self._held, ""
        return said, []

    def rest(self) -> tuple[str, list[Call]]:
        """Give the call, or the text that turned out to be none."""
        held, self._held = self._held, ""
        call = _read_call(held, "parameters")
        return ("", [call]) if call is not None else (held, [])


def offer_tools(
    request: ChatRequest, model: LoadedModel
) -> tuple[Template, Callable[[], CallReader]]:
    """Give the template with the request's tools in it, and what makes a reader of its reply.

    A template that knows of no tools leaves them out: the reply is text, as it may be with tools.

    Raises:
        ApiError: the tools are needed, and this model cannot be made to call one; or one of them
            spells a control token.
    """
    template = model.template
    if not request.tools or request.tool_choice == "none":
        return template, PlainText
    if request.tool_choice not in (None, "auto"):
        raise invalid(
            'a model here cannot be made to call a function; send tool_choice "auto" or "none"',
            param="tool_choice",
            code="unsupported_option",
        )
    if not isinstance(template, JinjaTemplate) or "tools" not in template.text:
        return template, PlainText
    tools = [it.model_dump(exclude_none=True) for it in request.tools]
    spelled = json.dumps(tools, ensure_ascii=False)
    if found := [it for it in control_tokens(model.tokenizer) if it in spelled]:
        raise invalid(f"a tool spells the control token {found[0]!r}; leave it out", param="tools")
    tokens: dict[str, Any] = {**template.tokens, "tools": tools}
    reader: Callable[[], CallReader] = PlainText
    if OPEN in template.text:
        reader = TaggedCalls
    elif LLAMA_WORDS in template.text:
        reader = WholeCall
    return replace(template, tokens=tokens), reader


def to_template(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Make the mappings that templates take of a request's messages."""
    made = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = "" if message.content is None else message.content
        mapping: dict[str, Any] = {"role": role, "content": content}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                mapping[name] = value
        if message.tool_calls:
            mapping["tool_calls"] = [_with_arguments(it) for it in message.tool_calls]
        made.append(mapping)
    return made


def _with_arguments(call: Any) -> dict[str, Any]:  # noqa: ANN401 - schemas.ToolCall
    """Write a call as templates take it: its arguments read, where they are JSON."""
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError:
        arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _read_call(text: str, key: str) -> Call | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return None
    arguments = content.get(key, content.get("arguments", {}))
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(content["name"], written)


def _overlap(text: str, mark: str) -> int:
    """Count the last characters of `text` that begin `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
