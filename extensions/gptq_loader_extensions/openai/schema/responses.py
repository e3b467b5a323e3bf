"""What clients may send to /v1/responses, and what that is as a chat."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.schema.schemas import (
    ChatRequest,
    Effort,
    Sampling,
    Text,
    TokenLimit,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ResponsesChat", "ResponsesRequest", "read_responses", "sampling_fields"]

TEXT_PARTS = ("input_text", "output_text", "text")
LOGPROBS = "message.output_text.logprobs"
EVERYTHING = 2**31 - 1  # tokens: more than any context has


class TextFormat(BaseModel):
    """The form of a reply."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    content: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(BaseModel):
    """What a text is to be like."""

    model_config = ConfigDict(strict=True, extra="forbid")

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(BaseModel):
    """How hard to think."""

    model_config = ConfigDict(strict=True, extra="forbid")

    effort: Effort | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(Sampling):
    """POST /v1/responses."""

    input: Text | Annotated[list[dict[str, Any]], Field(max_length=10_000)] | None = None
    instructions: Text | None = None
    previous_response_id: Annotated[str, Field(max_length=200)] | None = None
    store: bool | None = None
    max_output_tokens: TokenLimit | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=256)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, Any] | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    enable_thinking: bool | None = None


@dataclass(frozen=True, slots=True)
class ResponsesChat:
    """A request to /v1/responses as a chat.

    Attributes:
        chat: the chat.
        messages: those of it that a next response goes on from.
        custom: the tools whose calls have a text in place of arguments.
        ignored: what has no effect.
    """

    chat: ChatRequest
    messages: list[dict[str, Any]]
    custom: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()


@dataclass(slots=True)
class _Tools:
    """Tools as a chat has them."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    custom: set[str] = field(default_factory=set)
    ignored: set[str] = field(default_factory=set)


def read_responses(body: ResponsesRequest, before: Sequence[dict[str, Any]] = ()) -> ResponsesChat:
    """Return a request as a chat.

    Args:
        body: the request.
        before: the messages of the response that it goes on from.

    Raises:
        ApiError: something of it cannot be understood here.
    """
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages = [*before, *_messages(items or [])]
    if not messages:
        raise invalid("input: there is nothing to answer; send a text", param="input")
    tools = _read_tools(body.tools or [])
    ignored = set(tools.ignored)
    fields = sampling_fields(body)
    own = {"role": "system", "content": body.instructions}
    fields["messages"] = [own, *messages] if body.instructions else messages
    fields |= _own_fields(body)
    if tools.functions:
        fields["tools"] = tools.functions
        fields["tool_choice"] = _read_choice(body.tool_choice)
    elif body.tool_choice not in (None, "auto", "none"):
        raise invalid("tool_choice needs tools that can be called here", param="tool_choice")
    if body.text is not None and body.text.verbosity not in (None, "medium"):
        ignored.add("text.verbosity")
    ignored |= {f"include.{name[:100]}" for name in body.include or [] if name != LOGPROBS}
    chat = _chat(fields)
    return ResponsesChat(chat, messages, frozenset(tools.custom), tuple(sorted(ignored)))


def sampling_fields(body: Sampling) -> dict[str, Any]:
    """Return the options that a request has in common with every other."""
    dumped: dict[str, Any] = body.model_dump(
        include=set(Sampling.model_fields), exclude_none=True, by_alias=True
    )
    return dumped


def _own_fields(body: ResponsesRequest) -> dict[str, Any]:
    """Return the options that have another name in a chat."""
    fields: dict[str, Any] = {
        "max_completion_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls,
        "chat_template_kwargs": body.chat_template_kwargs,
        "enable_thinking": body.enable_thinking,
    }
    if body.text is not None and body.text.format is not None:
        fields["response_format"] = _read_format(body.text.format)
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    if body.top_logprobs or LOGPROBS in (body.include or []):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    if body.truncation == "auto":
        fields["truncation_length"] = body.truncation_length or EVERYTHING
    return fields


def _chat(fields: dict[str, Any]) -> ChatRequest:
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(map(str, first["loc"])).replace("messages", "input", 1)[:200]
        raise invalid(f"{param}: {first['msg']}", param=param) from error


def _messages(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return items as the messages of a chat: calls and thoughts belong to the assistant's."""
    messages: list[dict[str, Any]] = []
    thought = ""
    for i, item in enumerate(items):
        param = f"input.{i}"
        kind = item.get("type", "message")
        if kind == "message":
            role = item.get("role")
            message = {"role": role, "content": _content(item.get("content"), f"{param}.content")}
            if role == "assistant" and thought:
                message["reasoning_content"], thought = thought, ""
            messages.append(message)
        elif kind == "reasoning":
            thought += _thought(item)
        elif kind in ("function_call", "custom_tool_call"):
            last = messages[-1] if messages else {}
            if last.get("role") != "assistant":
                last = {"role": "assistant", "content": None}
                messages.append(last)
            if thought:
                last["reasoning_content"], thought = thought, ""
            last.setdefault("tool_calls", []).append(_call(item, kind, param))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            content = _content(item.get("output"), f"{param}.output")
            answer = {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
            messages.append(answer)
        else:
            raise invalid(
                f"{param}: an item of the type {str(kind)[:100]!r} is not understood here; leave "
                "it out",
                param=f"{param}.type",
            )
    return messages


def _content(content: Any, param: str) -> str:  # noqa: ANN401 - what a client sent
    """Return the text of a content, which may be in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{param}: send a text, or a list of parts of text", param=param)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if kind else None
        if kind not in (*TEXT_PARTS, "refusal") or not isinstance(text, str):
            raise invalid(
                f"{param}.{i}: a part of the type {str(kind)[:100]!r} is not understood here; send "
                "text alone",
                param=f"{param}.{i}",
            )
        texts.append(text)
    return "\n".join(texts)


def _thought(item: dict[str, Any]) -> str:
    parts = [*(item.get("content") or []), *(item.get("summary") or [])]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return "\n".join(text for text in texts if isinstance(text, str))


def _call(item: dict[str, Any], kind: str, param: str) -> dict[str, Any]:
    name, arguments = item.get("name"), item.get("arguments")
    if kind == "custom_tool_call":
        arguments = json.dumps({"input": item.get("input")}, ensure_ascii=False)
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise invalid(f"{param}: a call has a name and arguments, as texts", param=param)
    function = {"name": name, "arguments": arguments}
    return {"id": str(item.get("call_id")), "type": "function", "function": function}


def _read_tools(tools: Sequence[dict[str, Any]]) -> _Tools:
    """Return the tools that can be called here; those that OpenAI's own servers run are ignored."""
    read = _Tools()
    for tool in tools:
        kind = tool.get("type")
        if kind == "function":
            names = ("name", "description", "parameters", "strict")
            function = {name: tool[name] for name in names if tool.get(name) is not None}
            read.functions.append({"type": "function", "function": function})
        elif kind == "custom" and isinstance(tool.get("name"), str):
            read.custom.add(tool["name"])
            read.functions.append(_custom(tool))
        else:
            read.ignored.add(f"tools.{str(kind)[:100]}")
    return read


def _custom(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool that takes a text as a function with one argument."""
    parameters = {
        "type": "object",
        "properties": {"input": {"type": "string"}},
        "required": ["input"],
    }
    description = str(tool.get("description") or "")
    function = {"name": tool["name"], "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _read_choice(choice: str | dict[str, Any] | None) -> Any:  # noqa: ANN401 - a chat's
    """Return a choice of tools as a chat has it.

    Raises:
        ApiError: it is a tool of OpenAI's own servers.
    """
    if choice is None or isinstance(choice, str):
        return choice
    kind = choice.get("type")
    if kind in ("function", "custom"):
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind == "allowed_tools":
        tools = choice.get("tools") or []
        named = [{"type": "function", "function": {"name": it.get("name")}} for it in tools]
        subset = {"mode": choice.get("mode"), "tools": named}
        return {"type": "allowed_tools", "allowed_tools": subset}
    raise invalid(
        f"tool_choice: the tool {str(kind)[:100]!r} cannot be called here; choose a function",
        param="tool_choice",
    )


def _read_format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    schema = {"name": form.name, "schema": form.content, "strict": form.strict}
    return {"type": "json_schema", "json_schema": schema}
