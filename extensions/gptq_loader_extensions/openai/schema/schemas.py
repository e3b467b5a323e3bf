"""What clients may send, as OpenAI's API has it, and the options of local servers besides.

Types are strict: true is no number. A field that is not here is looked up in `unsupported.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gptq_loader_extensions.openai.schema.aliases import resolve_aliases
from gptq_loader_extensions.openai.schema.constraints import Structured
from gptq_loader_extensions.openai.schema.dialects import resolve_dialects

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "InternalLoad",
    "InternalLogits",
    "InternalText",
    "InternalTokens",
    "KoboldKey",
    "KoboldModel",
    "KoboldPrompt",
    "KoboldRequest",
    "Message",
    "Sampling",
    "Tool",
    "ToolCall",
]

Text = Annotated[str, Field(max_length=4_000_000)]
StopText = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=1_000_000)]
# How many tokens a reply may have; -1, or -2, is as many as there is room for (`resolve_aliases`).
TokenLimit = Annotated[int, Field(ge=1, lt=2**31, json_schema_extra={"minimum": -2})]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(BaseModel):
    """What a stream has besides the reply."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM: in every chunk
    include_obfuscation: bool | None = None  # of how long each part is, for who listens


class Sampling(Structured):
    """The options that every request for text has in common."""

    model_config = STRICT

    model: Annotated[str, Field(max_length=500)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10)] | None = None
    repetition_penalty_range: (
        Annotated[int, Field(ge=0, lt=2**31, json_schema_extra={"minimum": -1})] | None
    ) = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    truncation_length: (
        Annotated[int, Field(ge=2, lt=2**31, json_schema_extra={"minimum": -1})] | None
    ) = None
    stop: StopText | Annotated[list[StopText], Field(fail_fast=True, max_length=64)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True, max_length=1024)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=1000)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _resolve_aliases(cls, fields: object) -> object:
        return resolve_aliases(fields)


class Function(BaseModel):
    """A function that a model may call."""

    model_config = ConfigDict(strict=True, extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool: a function is the only kind there is."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["function"] = "function"
    function: Function


class CalledFunction(BaseModel):
    """The function of a call that a model requested, with its arguments as JSON, or parsed."""

    model_config = ConfigDict(strict=True)

    name: str
    arguments: str | dict[str, Any]


class ToolCall(BaseModel):
    """A call of a tool, in an assistant's message."""

    model_config = ConfigDict(strict=True)

    id: str | None = None  # which `resolve_dialects` gives it
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """A message of a conversation; its content's parts are checked where it is rendered."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None  # the same, as vLLM and OpenRouter call it
    prefix: bool | None = None  # DeepSeek and Mistral: to go on with this message


class FunctionName(BaseModel):
    """A function by its name."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class NamedTool(BaseModel):
    """A choice of one function by its name."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: FunctionName


class ToolSubset(BaseModel):
    """Some of the tools, and whether one of them must be called."""

    model_config = ConfigDict(strict=True, extra="forbid")

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class AllowedTools(BaseModel):
    """A choice among some of the tools."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["allowed_tools"]
    allowed_tools: ToolSubset


ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[NamedTool | AllowedTools, Field(discriminator="type")]
)


class ThinkingOptions(BaseModel):
    """Whether a model thinks before it answers, and for how long, as Anthropic and GLM have it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["enabled", "disabled", "adaptive", "auto"]
    budget_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    display: str | None = None
    clear_thinking: bool | None = None


class ReasoningOptions(BaseModel):
    """Whether a model thinks and for how long, as OpenRouter has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    effort: Effort | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=10_000)]
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] | None = None
    enable_thinking: bool | None = None
    thinking: ThinkingOptions | None = None
    thinking_budget: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    reasoning_effort: Effort | None = None
    reasoning: ReasoningOptions | None = None  # OpenRouter
    think: bool | Effort | None = None  # Ollama
    reasoning_format: Literal["none", "auto", "deepseek"] | None = None  # llama.cpp
    separate_reasoning: bool | None = None  # SGLang
    include_reasoning: bool | None = None  # vLLM

    @model_validator(mode="before")
    @classmethod
    def _resolve_dialects(cls, fields: object) -> object:
        return resolve_dialects(fields)

    @model_validator(mode="after")
    def _merge(self) -> Self:
        """Take over what is said of thinking under other names, and a begun message in parts."""
        if isinstance(self.think, bool) and self.enable_thinking is None:
            self.enable_thinking = self.think
        elif isinstance(self.think, str) and self.reasoning_effort is None:
            self.reasoning_effort = self.think
        if (reasoning := self.reasoning) is not None:
            if self.enable_thinking is None:
                self.enable_thinking = reasoning.enabled
            self.reasoning_effort = self.reasoning_effort or reasoning.effort
            if self.thinking_budget is None:
                self.thinking_budget = reasoning.max_tokens
            if reasoning.exclude:
                self.include_reasoning = False
        last = self.messages[-1]
        if (self.continue_final_message or last.prefix) and isinstance(last.content, list):
            texts = [part.get("text") for part in last.content if part.get("type") == "text"]
            if len(texts) == len(last.content) and all(isinstance(it, str) for it in texts):
                last.content = "".join(map(str, texts))
        return self


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Annotated[
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=64)]
        | TokenIds
        | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=64)],
        Field(union_mode="left_to_right"),
    ]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31, json_schema_extra={"minimum": -2})] | None = (
        None
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None


class KoboldRequest(Sampling):
    """POST /api/v1/generate and /api/extra/generate/stream."""

    prompt: Text
    memory: Text | None = None
    max_tokens: TokenLimit | None = None
    genkey: Annotated[str, Field(max_length=200)] | None = None


class KoboldKey(BaseModel):
    """Which reply is meant."""

    model_config = ConfigDict(strict=True, extra="ignore")

    genkey: Annotated[str, Field(max_length=200)] | None = None


class KoboldModel(BaseModel):
    """PUT /api/v1/model."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=500)]


class KoboldPrompt(BaseModel):
    """POST /api/extra/tokencount."""

    model_config = ConfigDict(strict=True, extra="ignore")

    prompt: Text


class InternalText(BaseModel):
    """POST /v1/internal/encode and /v1/internal/token-count."""

    model_config = ConfigDict(strict=True, extra="forbid")

    text: Text


class InternalTokens(BaseModel):
    """POST /v1/internal/decode."""

    model_config = ConfigDict(strict=True, extra="forbid")

    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=1_000_000)]


class InternalLoad(BaseModel):
    """POST /v1/internal/model/load."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model_name: Annotated[str, Field(min_length=1, max_length=500)]
    args: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None


class InternalLogits(BaseModel):
    """POST /v1/internal/logits."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Text
    top_logits: Annotated[int, Field(ge=1, le=200)] = 50
    use_samplers: bool = False
