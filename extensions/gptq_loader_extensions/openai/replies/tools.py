"""Offer tools to a model, with a template that has a place for them or without one."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.call_formats import CallTranslator, find_format
from gptq_loader_extensions.openai.replies.structured import schema_rule, to_lark
from gptq_loader_extensions.openai.replies.tool_parsers import (
    CLOSE,
    OPEN,
    BareToolParser,
    HermesToolParser,
    NoToolParser,
    TranslatedToolParser,
)
from gptq_loader_extensions.openai.schema.json_text import parse_json
from gptq_loader_plugin.chat.channels import uses_channels
from gptq_loader_plugin.chat.encode import control_tokens
from gptq_loader_plugin.chat.templates import JinjaTemplate
from gptq_loader_plugin.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gptq_loader_extensions.openai.replies.tool_parsers import ToolParser
    from gptq_loader_extensions.openai.schema.schemas import ChatRequest, Tool
    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["OfferedTools", "offer_tools", "set_variables", "template_messages"]

LLAMA_MARK = '"parameters": dictionary'  # how Llama 3's templates ask for a call
# Formats whose calls are no JSON, though they stand between the same tags.
TAGGED = ("<arg_key>", "<function=")
MAX_CALLS = 16  # in one reply where a call is required: a small model would go on
# Hermes' own words, as Qwen's templates have them too.
INTRODUCTION = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """Tools as a model is offered them.

    Attributes:
        template: the template, with the tools among its variables where it has a place for them.
        messages: the conversation, with the tools in it where the template has none.
        make_parser: makes what finds the calls in a reply.
        required: whether the reply must be a call.
        write_calls: writes rules of Lark, among them `calls`; None where no tool is offered.
        strict: writes what each call must keep to, from what opens it to its end, where a function
            asks for that.
        stop: texts that end a reply after its only call.
        shown: special tokens that mark calls.
    """

    template: Template
    messages: list[dict[str, Any]]
    make_parser: Callable[[], ToolParser] = NoToolParser
    required: bool = False
    write_calls: Callable[[], str] | None = None
    strict: Callable[[], str] | None = None
    stop: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


def offer_tools(
    request: ChatRequest, model: LoadedModel, messages: list[dict[str, Any]]
) -> OfferedTools:
    """Offer a request's tools to a model.

    Args:
        request: the request.
        model: the model.
        messages: the conversation, as templates take it.

    Raises:
        ApiError: a function that must be called is none of the tools; or one of them spells a
            control token.
    """
    template = model.template
    text = template.text if isinstance(template, JinjaTemplate) else ""
    if "tool_calls" not in text or "tools" not in text:
        messages = _with_calls_as_text(messages)
    elif not _renders(template, messages):
        messages = _with_written_arguments(messages)
    tools, required = _chosen(request)
    if not tools:
        return OfferedTools(template, messages)
    offered = [tool.model_dump(exclude_none=True) for tool in tools]
    single = request.parallel_tool_calls is False or _names_one(request)
    if "tools" in text:
        template = set_variables(template, {"tools": offered}, model, param="tools")
    else:
        written = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in offered)
        messages = with_system(INTRODUCTION.format(tools=written), messages, template)
    form = find_format(text) if OPEN not in text else None
    if (
        "tools" in text and OPEN not in text and form is None and not uses_channels(text)
    ):  # what marks a call, if anything, is no text
        names = frozenset(tool.function.name for tool in tools)
        key = "parameters" if LLAMA_MARK in text else "arguments"
        return OfferedTools(
            template,
            messages,
            lambda: BareToolParser(names, single),
            required,
            lambda: f"calls: call\n{_call_rules(tools, key)}",
        )
    if form is not None:
        return OfferedTools(
            template,
            messages,
            lambda: TranslatedToolParser(CallTranslator(form), HermesToolParser(single)),
            required,
            lambda: _tagged_calls(tools, single=single),
            shown=form.tokens,
        )
    is_strict = any(tool.function.strict for tool in tools)
    is_json = not any(mark in text for mark in TAGGED)
    return OfferedTools(
        template,
        messages,
        lambda: HermesToolParser(single),
        required,
        lambda: _tagged_calls(tools, single=single),
        (lambda: _strict_call(tools)) if is_strict and is_json else None,
        (CLOSE,) if single else (),
    )


def _tagged_calls(tools: list[Tool], *, single: bool) -> str:
    """Write the rules of one call between tags, or of several."""
    more = "" if single else f' ("\\n" one){{0,{MAX_CALLS - 1}}}'
    before, after = to_lark(f"{OPEN}\n"), to_lark(f"\n{CLOSE}")
    one = f"one: {before} call {after}"
    return f"calls: one{more}\n{one}\n{_call_rules(tools, 'arguments')}"


def _strict_call(tools: list[Tool]) -> str:
    """Write a grammar of what follows the tag that opens a call."""
    return f"start: call /\\n?/ {to_lark(CLOSE)}\n{_call_rules(tools, 'arguments')}"


def set_variables(
    template: Template, variables: Mapping[str, Any], model: LoadedModel, *, param: str
) -> Template:
    """Return a template with more variables.

    Args:
        template: of any kind; only one in jinja has variables.
        variables: by name.
        model: whose control tokens none of them may spell.
        param: the field of the request that has them.

    Raises:
        ApiError: one of them spells a control token.
    """
    if not isinstance(template, JinjaTemplate) or not variables:
        return template
    written = json.dumps(variables, ensure_ascii=False)
    if spelled := [token for token in control_tokens(model.tokenizer) if token in written]:
        what = "a tool" if param == "tools" else param
        raise invalid(f"{what} spells the control token {spelled[0]!r}; leave it out", param=param)
    return replace(template, tokens={**template.tokens, **variables})


def template_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """Return a request's messages as the mappings that templates take."""
    mappings = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        content = "" if message.content is None else message.content
        mapping: dict[str, Any] = {"role": role, "content": content}
        for name in ("name", "tool_call_id"):
            if (value := getattr(message, name)) is not None:
                mapping[name] = value
        reasoning = message.reasoning_content or message.reasoning
        if reasoning:
            mapping["reasoning_content"] = reasoning
        if message.tool_calls:
            mapping["tool_calls"] = [_template_call(call) for call in message.tool_calls]
        mappings.append(mapping)
    return mappings


def with_system(
    text: str, messages: list[dict[str, Any]], template: Template
) -> list[dict[str, Any]]:
    """Return the messages with a text in the system message, or where a template has none.

    Then it is the first thing that the user says.
    """
    system = messages[0] if messages and messages[0]["role"] == "system" else None
    if system is not None:
        return [{**system, "content": f"{_text(system)}\n\n{text}".strip()}, *messages[1:]]
    if _takes_system(template):
        return [{"role": "system", "content": text}, *messages]
    first = next((i for i, it in enumerate(messages) if it["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": text}, *messages]
    user = {**messages[first], "content": f"{text}\n\n{_text(messages[first])}"}
    return [*messages[:first], user, *messages[first + 1 :]]


def _takes_system(template: Template) -> bool:
    """Return whether a template writes a system message."""
    probe = "gptqsystem"
    try:
        text = template.render(
            [{"role": "system", "content": probe}, {"role": "user", "content": "a"}]
        )
    except TemplateError:
        return False
    return probe in text


def _with_calls_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write calls and their answers as text, for a template that leaves them out.

    The answers are the user's words, those that follow each other in one message, since many
    templates take user and assistant by turns.
    """
    if not any(it["role"] == "tool" or "tool_calls" in it for it in messages):
        return messages
    written: list[dict[str, Any]] = []
    answering = False
    for message in messages:
        if message["role"] == "tool":
            answer = f"<tool_response>\n{_text(message)}\n</tool_response>"
            if answering:
                answer = f"{written.pop()['content']}\n{answer}"
            written.append({"role": "user", "content": answer})
            answering = True
            continue
        if message["role"] == "user" and answering:
            written.append(
                {**message, "content": f"{written.pop()['content']}\n\n{_text(message)}"}
            )
        elif calls := message.get("tool_calls"):
            texts = [_text(message)] if message["content"] else []
            texts += [
                f"{OPEN}\n{json.dumps(call['function'], ensure_ascii=False)}\n{CLOSE}"
                for call in calls
            ]
            rest = {name: value for name, value in message.items() if name != "tool_calls"}
            written.append({**rest, "content": "\n".join(texts)})
        else:
            written.append(message)
        answering = False
    return written


def _renders(template: Template, messages: list[dict[str, Any]]) -> bool:
    """Return whether a template takes messages whose calls have arguments, if they have any."""
    if not any("tool_calls" in message for message in messages):
        return True
    try:
        template.render(messages)
    except TemplateError:
        return False
    return True


def _with_written_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the arguments of calls as JSON, as OpenAI's API has them: some templates join texts."""
    written = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": _write(call["function"])}}
            for call in message.get("tool_calls", ())
        ]
        written.append({**message, "tool_calls": calls} if calls else message)
    return written


def _write(function: Mapping[str, Any]) -> str:
    arguments = function["arguments"]
    is_text = isinstance(arguments, str)
    return arguments if is_text else json.dumps(arguments, ensure_ascii=False)


def _text(message: Mapping[str, Any]) -> str:
    """Return a message's content as one text; what is no text is refused when it is rendered."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content)


def _chosen(request: ChatRequest) -> tuple[list[Tool], bool]:
    """Return the tools that may be called, and whether one must be.

    Raises:
        ApiError: a function that is chosen is none of them.
    """
    tools, choice = request.tools or [], request.tool_choice
    if choice is None or choice in ("none", "auto"):
        return ([] if choice == "none" else tools), False
    if not tools:
        raise invalid("tool_choice needs tools; send some, or leave it out", param="tool_choice")
    if isinstance(choice, str):
        return tools, True
    if choice.type == "function":
        return _named(tools, [choice.function.name]), True
    subset = choice.allowed_tools
    return _named(tools, [it.function.name for it in subset.tools]), subset.mode == "required"


def _named(tools: list[Tool], names: list[str]) -> list[Tool]:
    for name in names:
        if not any(tool.function.name == name for tool in tools):
            raise invalid(
                f"tool_choice names the function {name[:100]!r}, which is none of the tools",
                param="tool_choice",
            )
    return [tool for tool in tools if tool.function.name in names]


def _names_one(request: ChatRequest) -> bool:
    choice = request.tool_choice
    return choice is not None and not isinstance(choice, str) and choice.type == "function"


def _call_rules(tools: list[Tool], key: str) -> str:
    """Write the rules of Lark for a call of any of the tools."""
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        function = tool.function
        head = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "{key}": '
        rules.append(f"call_{i}: {to_lark(head)} arguments_{i} {to_lark('}')}")
        schema = _arguments_schema(function.parameters)
        closed = function.strict is not False
        rule = schema_rule(schema, f"tools.{i}.function.parameters", closed=closed)
        rules.append(f"arguments_{i}: {rule}")
    return "\n".join(rules) + "\n"


def _arguments_schema(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Return the schema of a function's arguments; a function without parameters takes none."""
    if not parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return parameters if "type" in parameters else {"type": "object", **parameters}


def _template_call(call: Any) -> dict[str, Any]:  # noqa: ANN401 - schemas.ToolCall
    """Return a call as templates take it: with its arguments parsed, where they are JSON."""
    arguments = call.function.arguments
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = parse_json(arguments or "{}")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
