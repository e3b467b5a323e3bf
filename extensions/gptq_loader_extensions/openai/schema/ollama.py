"""What Ollama's clients may send, and what that is as a chat or a completion."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.schema.schemas import (
    ChatRequest,
    CompletionRequest,
    Sampling,
    Text,
    Tool,
)
from gptq_loader_extensions.openai.schema.unsupported import check_extra

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "OllamaBase",
    "OllamaChat",
    "OllamaGenerate",
    "OllamaPull",
    "OllamaShow",
    "keep_seconds",
    "model_name",
    "read_chat",
    "read_generate",
]

# How Ollama runs a model: what it is here was settled when the server started.
OF_THE_MACHINE = frozenset(
    {
        "f16_kv",
        "logits_all",
        "low_vram",
        "main_gpu",
        "num_batch",
        "num_gpu",
        "num_thread",
        "numa",
        "use_mlock",
        "use_mmap",
        "vocab_only",
    }
)
# Go's durations, as in "1h30m"; 0 alone needs no unit.
DURATION = re.compile(r"[+-]?(?:0|(?:(?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|\u00b5s|\u03bcs|ms|s|m|h))+)")
PART = re.compile(r"([\d.]+)(ns|us|\u00b5s|\u03bcs|ms|s|m|h)")
SECONDS = {
    "ns": 1e-9,
    "us": 1e-6,
    "\u00b5s": 1e-6,
    "\u03bcs": 1e-6,
    "ms": 1e-3,
    "s": 1,
    "m": 60,
    "h": 3600,
}
Format = Literal["", "json"] | dict[str, Any]
Think = bool | Literal["low", "medium", "high", "max"]
Request = TypeVar("Request", ChatRequest, CompletionRequest)


class OllamaFunction(BaseModel):
    """The function of a call."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: str
    arguments: dict[str, Any] | None = None


class OllamaCall(BaseModel):
    """A call of a function, in an assistant's message."""

    model_config = ConfigDict(strict=True, extra="ignore")

    id: str | None = None
    function: OllamaFunction


class OllamaOptions(Sampling):
    """The options of a request, under Ollama's names."""

    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class OllamaMessage(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    thinking: Text | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_calls: Annotated[list[OllamaCall], Field(max_length=128)] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaBase(BaseModel):
    """What chats and completions have in common."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Annotated[str, Field(max_length=500)] | None = None
    stream: bool | None = None
    format: Format | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None
    think: Think | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncate: bool | None = None
    shift: bool | None = None


class OllamaChat(OllamaBase):
    """POST /api/chat."""

    messages: Annotated[list[OllamaMessage], Field(max_length=10_000)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None


class OllamaGenerate(OllamaBase):
    """POST /api/generate."""

    prompt: Text | None = None
    suffix: Literal[""] | None = None
    system: Text | None = None
    template: Literal[""] | None = None
    context: Annotated[list[int], Field(max_length=0)] | None = None
    raw: bool | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None


class OllamaShow(BaseModel):
    """POST /api/show."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


class OllamaPull(BaseModel):
    """POST /api/pull."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    name: str | None = None
    stream: bool | None = None
    insecure: bool | None = None


def keep_seconds(keep_alive: str | float | None) -> float | None:
    """Return for how many seconds a model is to be kept after a reply; None is for ever.

    Args:
        keep_alive: seconds, or a duration such as "5m"; one below 0 is for ever.

    Raises:
        ApiError: it is no duration.
    """
    if keep_alive is None:
        return None
    if isinstance(keep_alive, str):
        if not DURATION.fullmatch(keep_alive):
            raise invalid(
                f'keep_alive: {keep_alive[:100]!r} is no duration; send seconds, or "5m"',
                param="keep_alive",
            )
        seconds = sum(float(number) * SECONDS[unit] for number, unit in PART.findall(keep_alive))
        keep_alive = -seconds if keep_alive.startswith("-") else seconds
    return None if keep_alive < 0 else float(keep_alive)


def model_name(name: str | None) -> str | None:
    """Return a model's name without the tag that Ollama's clients add."""
    return None if name is None else name.removesuffix(":latest") or None


def read_chat(body: OllamaChat) -> tuple[ChatRequest, tuple[str, ...]]:
    """Return a conversation as a chat, and the names of what has no effect.

    Raises:
        ApiError: something of it cannot be understood here.
    """
    messages = [_message(message) for message in body.messages or []]
    _name_calls(messages)
    fields, ignored = _fields(body)
    if body.tools:
        fields["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    last = messages[-1]
    if last["role"] == "assistant" and last["content"] and "tool_calls" not in last:
        fields["continue_final_message"] = True
    return _validated(ChatRequest, {**fields, **_thinking(body), "messages": messages}), ignored


def read_generate(
    body: OllamaGenerate,
) -> tuple[ChatRequest | CompletionRequest, tuple[str, ...]]:
    """Return a prompt as a chat or, raw, as a completion; and the names of what has no effect.

    Raises:
        ApiError: something of it cannot be understood here.
    """
    fields, ignored = _fields(body)
    if body.raw:
        if body.system or body.think:
            raise invalid("a raw prompt has no system message and no thinking", param="raw")
        if body.logprobs:
            raise invalid(
                "logprobs of a raw prompt are not sent here; use /v1/completions", param="logprobs"
            )
        fields.setdefault("max_tokens", -1)
        return _validated(CompletionRequest, {**fields, "prompt": body.prompt}), ignored
    messages = [{"role": "user", "content": body.prompt}]
    if body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    return _validated(ChatRequest, {**fields, **_thinking(body), "messages": messages}), ignored


def _message(message: OllamaMessage) -> dict[str, Any]:
    written: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.thinking:
        written["reasoning_content"] = message.thinking
    if message.tool_call_id:
        written["tool_call_id"] = message.tool_call_id
    if message.tool_name:
        written["name"] = message.tool_name
    if message.tool_calls:
        written["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": json.dumps(call.function.arguments or {}, ensure_ascii=False),
                },
            }
            for call in message.tool_calls
        ]
    return written


def _name_calls(messages: Sequence[dict[str, Any]]) -> None:
    """Give calls ids, which Ollama's may lack, and their answers the same ones, in order."""
    count = 0
    unanswered: list[str] = []
    for message in messages:
        for call in message.get("tool_calls", ()):
            count += 1
            call["id"] = call["id"] or f"call_{count}"
            unanswered.append(call["id"])
        if message["role"] == "tool" and unanswered:
            message.setdefault("tool_call_id", unanswered.pop(0))


def _fields(body: OllamaBase) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the options of a request, and those that have no effect."""
    options = {name: value for name, value in (body.options or {}).items() if value is not None}
    ignored = sorted(OF_THE_MACHINE & set(options))
    if keep_seconds(body.keep_alive):  # a model is kept until it, or another, is asked for
        ignored.append("keep_alive")
    fields = {name: value for name, value in options.items() if name not in OF_THE_MACHINE}
    if body.truncate is False:
        fields.pop("num_ctx", None)
    sampling = _validated(OllamaOptions, fields)
    ignored += check_extra(sampling)
    fields = sampling.model_dump(
        include=set(OllamaOptions.model_fields), exclude_none=True, by_alias=True
    )
    if sampling.max_tokens == 0:  # which asks for no limit
        del fields["max_tokens"]
    if body.logprobs or body.top_logprobs:
        fields |= {"logprobs": body.logprobs, "top_logprobs": body.top_logprobs}
    if body.format == "json":
        fields["response_format"] = {"type": "json_object"}
    elif body.format:
        schema = {"name": "format", "schema": body.format}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return {**fields, "model": model_name(body.model)}, tuple(ignored)


def _thinking(body: OllamaBase) -> dict[str, Any]:
    """Return whether to think, as a chat has it."""
    if body.think is None:
        return {}
    if isinstance(body.think, bool):
        return {"enable_thinking": body.think}
    return {"enable_thinking": True, "reasoning_effort": body.think}


def _validated(model: Any, fields: dict[str, Any]) -> Any:  # noqa: ANN401 - a request of that kind
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = ".".join(map(str, first["loc"]))[:200]
        raise invalid(f"{param}: {first['msg']}", param=param) from error
