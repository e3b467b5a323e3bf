"""Offer tools to templates that support them, and parse the calls in what a model writes."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.schema.json_text import parse_json
from gptq_loader_plugin.chat.encode import control_tokens
from gptq_loader_plugin.chat.templates import JinjaTemplate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_extensions.openai.schema.schemas import ChatRequest
    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = [
    "FunctionCall",
    "HermesToolParser",
    "LlamaToolParser",
    "NoToolParser",
    "ToolParser",
    "offer_tools",
    "template_messages",
]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
LLAMA_MARK = '"parameters": dictionary'  # how Llama 3's templates ask for a call


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A call of a function that a model requests.

    Attributes:
        name: the function's.
        arguments: as JSON.
        call_id: what the answer to it refers to.
    """

    name: str
    arguments: str
    call_id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def to_json(self) -> dict[str, Any]:
        """Return the call as OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class ToolParser(Protocol):
    """Separate a reply's text from the calls in it."""

    def feed(self, text: str) -> tuple[str, list[FunctionCall]]:
        """Feed a chunk; return the text that is in no call, and the calls that are complete."""
        ...

    def finish(self) -> tuple[str, list[FunctionCall]]:
        """Return what was held back, at the reply's end."""
        ...


class NoToolParser:
    """All of a reply is text."""

    def feed(self, text: str) -> tuple[str, list[FunctionCall]]:
        """Return the chunk as it is."""
        return text, []

    def finish(self) -> tuple[str, list[FunctionCall]]:
        """Return nothing: nothing was held back."""
        return "", []


class HermesToolParser:
    """Calls as Hermes and Qwen write them: JSON between `<tool_call>` and `</tool_call>`."""

    def __init__(self) -> None:
        self._held = ""
        self._after_call = False  # whose newline is no text

    def feed(self, text: str) -> tuple[str, list[FunctionCall]]:
        """Feed a chunk; hold back what may be the beginning of a call."""
        self._held += text
        plain = ""
        calls: list[FunctionCall] = []
        while True:
            if self._after_call:
                self._held = self._held.lstrip("\n")
                self._after_call = not self._held
            at = self._held.find(OPEN)
            if at < 0:
                keep = _overlap(self._held, OPEN)
                plain += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                return plain, calls
            plain, self._held = plain + self._held[:at], self._held[at:]
            inside, close, after = self._held[len(OPEN) :].partition(CLOSE)
            if not close:
                return plain, calls
            call = _parse_call(inside, "arguments")
            if call is None:
                plain += OPEN + inside + CLOSE
            else:
                calls.append(call)
                self._after_call = True
            self._held = after

    def finish(self) -> tuple[str, list[FunctionCall]]:
        """Return a call whose end is missing, where it can be parsed, else the text."""
        held, self._held = self._held, ""
        call = _parse_call(held.removeprefix(OPEN), "arguments") if held.startswith(OPEN) else None
        return ("", [call]) if call is not None else (held, [])


class LlamaToolParser:
    """A call as Llama 3 writes it: a reply that is JSON and nothing else."""

    def __init__(self) -> None:
        self._held = ""
        self._plain = False

    def feed(self, text: str) -> tuple[str, list[FunctionCall]]:
        """Hold everything back while it may be a call."""
        self._held += text
        if not self._plain and (not self._held.strip() or self._held.lstrip().startswith("{")):
            return "", []
        self._plain = True
        plain, self._held = self._held, ""
        return plain, []

    def finish(self) -> tuple[str, list[FunctionCall]]:
        """Return the call, or the text that turned out to be none."""
        held, self._held = self._held, ""
        call = _parse_call(held, "parameters")
        return ("", [call]) if call is not None else (held, [])


def offer_tools(
    request: ChatRequest, model: LoadedModel
) -> tuple[Template, Callable[[], ToolParser]]:
    """Return the template with the request's tools in it, and what makes a parser of a reply.

    A template without tools leaves them out: the reply is text, as it may be with tools.

    Raises:
        ApiError: the tools are needed, and this model cannot be made to call one; or one of them
            spells a control token.
    """
    template = model.template
    if not request.tools or request.tool_choice == "none":
        return template, NoToolParser
    if request.tool_choice not in (None, "auto"):
        raise invalid(
            'a model here cannot be made to call a function; send tool_choice "auto" or "none"',
            param="tool_choice",
            code="unsupported_option",
        )
    if not isinstance(template, JinjaTemplate) or "tools" not in template.text:
        return template, NoToolParser
    tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
    written = json.dumps(tools, ensure_ascii=False)
    if spelled := [token for token in control_tokens(model.tokenizer) if token in written]:
        raise invalid(
            f"a tool spells the control token {spelled[0]!r}; leave it out", param="tools"
        )
    tokens: dict[str, Any] = {**template.tokens, "tools": tools}
    make_parser: Callable[[], ToolParser] = NoToolParser
    if OPEN in template.text:
        make_parser = HermesToolParser
    elif LLAMA_MARK in template.text:
        make_parser = LlamaToolParser
    return replace(template, tokens=tokens), make_parser


def template_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a request's messages as the mappings that templates take."""
    mappings = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = "" if message.content is None else message.content
        mapping: dict[str, Any] = {"role": role, "content": content}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                mapping[name] = value
        if message.tool_calls:
            mapping["tool_calls"] = [_template_call(call) for call in message.tool_calls]
        mappings.append(mapping)
    return mappings


def _template_call(call: Any) -> dict[str, Any]:  # noqa: ANN401 - schemas.ToolCall
    """Return a call as templates take it: with its arguments parsed, where they are JSON."""
    try:
        arguments = parse_json(call.function.arguments)
    except ValueError:
        arguments = call.function.arguments
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _parse_call(text: str, key: str) -> FunctionCall | None:
    try:
        content = parse_json(text)
    except ValueError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return None
    arguments = content.get(key, content.get("arguments", {}))
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return FunctionCall(content["name"], written)


def _overlap(text: str, mark: str) -> int:
    """Count the last characters of `text` that begin `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
