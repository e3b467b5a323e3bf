"""What clients of Anthropic's API may send to /v1/messages, and what that is as a chat."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_loader_extensions.openai.errors import ApiError, invalid
from gptq_loader_extensions.openai.schema.schemas import STRICT, ChatRequest, Text

__all__ = ["AnthropicRequest", "CountRequest", "read_anthropic"]

Blocks = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
# Of the request as a whole: they change nothing of the reply.
WITHOUT_EFFECT = frozenset(
    {
        "betas",
        "cache_control",
        "context_management",
        "diagnostics",
        "inference_geo",
        "metadata",
        "service_tier",
        "user_profile_id",
        "workspace_id",
    }
)
NEUTRAL: dict[str, tuple[object, ...]] = {
    "container": (None,),
    "mcp_servers": (None, []),
    "speed": (None, "standard"),
}
EFFORT = "effort"


class AnthropicMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["user", "assistant", "system"]
    content: Text | Blocks


class ToolChoice(BaseModel):
    """Which tool to call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thread(BaseModel):
    """Whether the conversation is to be kept for the next request, or goes on from one that was."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["create", "continue"]
    previous_message_id: Annotated[str, Field(max_length=200)] | None = None


class AnthropicBase(BaseModel):
    """What a request for a message and one for its count have in common."""

    model_config = STRICT

    model: Annotated[str, Field(max_length=500)] | None = None
    messages: Annotated[list[AnthropicMessage], Field(max_length=10_000)]
    system: Text | Blocks | None = None
    tools: Annotated[list[dict[str, Any]], Field(max_length=256)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None


class CountRequest(AnthropicBase):
    """POST /v1/messages/count_tokens."""


class AnthropicRequest(AnthropicBase):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    stop_sequences: Annotated[list[str], Field(max_length=64)] | None = None
    thread: Thread | None = None


def read_anthropic(body: AnthropicBase) -> tuple[ChatRequest, tuple[str, ...]]:
    """Return a request as a chat, and the names of what has no effect.

    Raises:
        ApiError: something of it cannot be understood here.
    """
    ignored = _check_extra(body.model_extra or {}) | _check_thread(body)
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for i, message in enumerate(body.messages):
        messages += _messages(message, f"messages.{i}")
    fields: dict[str, Any] = {"messages": messages, "model": body.model, "thinking": body.thinking}
    tools, not_run = _tools(body.tools or [])
    ignored |= not_run
    if tools:
        fields["tools"] = tools
    fields |= _choice(body.tool_choice, tools)
    config = dict(body.output_config or {})
    form = config.pop("format", None) or body.output_format
    if form is not None:
        schema = {"name": "output", "schema": form.get("schema")}
        fields["response_format"] = {"type": form.get("type"), "json_schema": schema}
    if (effort := config.pop(EFFORT, None)) is not None:
        fields["reasoning_effort"] = effort
    ignored |= {f"output_config.{name}"[:200] for name in config}
    if isinstance(body, AnthropicRequest):
        fields |= {
            "max_tokens": body.max_tokens,
            "stream": body.stream,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": body.top_k,
            "stop": body.stop_sequences,
        }
    # A last message of the assistant's is what the reply begins with.
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        fields["continue_final_message"] = True
    try:
        chat = ChatRequest.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(map(str, first["loc"]))[:200]
        raise invalid(f"{param}: {first['msg']}", param=param) from error
    return chat, tuple(sorted(ignored))


def _check_thread(body: AnthropicBase) -> set[str]:
    """Let a thread begin, which is not kept here: each request brings the whole conversation.

    Returns:
        The field that has no effect, where a thread begins.

    Raises:
        ApiError: it goes on from one, and clients then send the conversation as a new thread's; or
            there is no message.
    """
    thread = body.thread if isinstance(body, AnthropicRequest) else None
    if thread is not None and thread.type == "continue":
        raise ApiError(
            404,
            f"thread: the message {thread.previous_message_id!r} is not kept here; send the whole "
            "conversation",
            param="thread",
            details={"error_code": "thread_not_found"},
        )
    if not body.messages:
        raise invalid("messages: there is nothing to answer; send a message", param="messages")
    return set() if thread is None else {"thread"}


def _check_extra(extra: dict[str, Any]) -> set[str]:
    """Refuse fields that are not understood; return those that have no effect.

    Raises:
        ApiError: there is one.
    """
    for name, value in extra.items():
        is_neutral = value is None or (name in NEUTRAL and value in NEUTRAL[name])
        if name in WITHOUT_EFFECT or is_neutral:
            continue
        if name in NEUTRAL:
            raise invalid(f"{name} is not supported here; leave it out", param=name)
        raise invalid(
            f"{name[:100]}: there is no such field; correct its spelling, or leave it out",
            param=name[:200],
        )
    return {"context_management"} if extra.get("context_management") else set()


def _messages(message: AnthropicMessage, param: str) -> list[dict[str, Any]]:
    """Return a message as those of a chat: the results of calls are messages of their own."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    read = _Blocks()
    for i, block in enumerate(message.content):
        read.add(block, f"{param}.content.{i}")
    return read.messages(message.role)


class _Blocks:
    """The blocks of one message, by kind."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._results: list[dict[str, Any]] = []

    def add(self, block: dict[str, Any], param: str) -> None:
        """Add a block.

        Raises:
            ApiError: it is not understood here.
        """
        match block.get("type"):
            case "text":
                self._texts.append(_string(block.get("text"), f"{param}.text"))
            case "thinking":
                self._thoughts.append(_string(block.get("thinking"), f"{param}.thinking"))
            case "redacted_thinking":
                pass  # which no other server can read
            case "tool_use":
                self._calls.append(_call(block, param))
            case "tool_result":
                self._results.append(_result(block, param))
            case "document":
                self._texts.append(_document(block, param))
            case kind:
                raise _not_understood(param, kind)

    def messages(self, role: str) -> list[dict[str, Any]]:
        """Return them as messages: the results of calls first, each one of its own."""
        message: dict[str, Any] = {"role": role, "content": "\n".join(self._texts)}
        if self._thoughts:
            message["reasoning_content"] = "\n".join(self._thoughts)
        if self._calls:
            message["tool_calls"] = self._calls
        is_empty = not (self._texts or self._calls or self._thoughts)
        return self._results if self._results and is_empty else [*self._results, message]


def _call(block: dict[str, Any], param: str) -> dict[str, Any]:
    arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
    function = {"name": _string(block.get("name"), f"{param}.name"), "arguments": arguments}
    return {"id": str(block.get("id")), "type": "function", "function": function}


def _result(block: dict[str, Any], param: str) -> dict[str, Any]:
    content = block.get("content")
    text = "" if content is None else _text(content, f"{param}.content")
    if block.get("is_error"):
        text = f"Error: {text}"
    return {"role": "tool", "tool_call_id": str(block.get("tool_use_id")), "content": text}


def _document(block: dict[str, Any], param: str) -> str:
    source = block.get("source")
    if not isinstance(source, dict) or source.get("type") != "text":
        raise _not_understood(f"{param}.source", "a document that is no text")
    return _string(source.get("data"), f"{param}.source.data")


def _text(content: Any, param: str) -> str:  # noqa: ANN401 - what a client sent
    """Return the text of a content, which may be in blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{param}: send a text, or a list of blocks of text", param=param)
    texts = []
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_reference":
            continue
        if kind != "text":
            raise _not_understood(f"{param}.{i}", kind)
        texts.append(_string(block.get("text"), f"{param}.{i}.text"))
    return "\n\n".join(texts)


def _string(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise invalid(f"{param}: send a text", param=param)
    return value


def _not_understood(param: str, kind: object) -> Exception:
    return invalid(
        f"{param}: a block of the type {str(kind)[:100]!r} is not understood here; send text alone",
        param=param,
    )


def _tools(tools: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], set[str]]:
    """Return the tools that can be called here; those of Anthropic's own are ignored."""
    functions: list[dict[str, Any]] = []
    ignored = set()
    for tool in tools:
        kind = tool.get("type")
        if kind not in (None, "custom"):
            ignored.add(f"tools.{str(kind)[:100]}")
            continue
        function = {
            "name": tool.get("name"),
            "description": tool.get("description"),
            "parameters": tool.get("input_schema"),
            "strict": tool.get("strict"),
        }
        present = {name: value for name, value in function.items() if value is not None}
        functions.append({"type": "function", "function": present})
    return functions, ignored


def _choice(choice: ToolChoice | None, tools: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a choice of tools as a chat has it."""
    if choice is None:
        return {}
    fields: dict[str, Any] = {}
    if choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    match choice.type:
        case "any":
            fields["tool_choice"] = "required"
        case "tool":
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        case kind:
            fields["tool_choice"] = kind if tools else None
    return fields
