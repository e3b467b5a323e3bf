"""Make a chat's prompt, and what reads its reply."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.continuing import ContinuedTemplate
from gptq_loader_extensions.openai.replies.prompt_tokenizer import prompt_tokenizer
from gptq_loader_extensions.openai.replies.structured import MaskOptions, make_mask, write_grammar
from gptq_loader_extensions.openai.replies.thinking import (
    ThinkingBudget,
    thinking_variables,
    unused_variables,
)
from gptq_loader_extensions.openai.replies.tool_parsers import OPEN
from gptq_loader_extensions.openai.replies.tools import (
    offer_tools,
    set_variables,
    template_messages,
)
from gptq_loader_extensions.openai.schema.constraints import read_constraint
from gptq_loader_plugin.chat.channels import CALL
from gptq_loader_plugin.chat.messages import drop_oldest
from gptq_loader_plugin.chat.thinking import find_marks
from gptq_loader_plugin.errors import PromptTooLong

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_extensions.openai.replies.prompt_tokenizer import PromptTokenizer
    from gptq_loader_extensions.openai.replies.tool_parsers import ToolParser
    from gptq_loader_extensions.openai.replies.tools import OfferedTools
    from gptq_loader_extensions.openai.schema.schemas import ChatRequest
    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.chat.thinking import ThinkingMarks
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = ["ChatPrompt", "encode_chat", "make_chat_prompt"]

# Variables of a template that the request's own options set.
RESERVED = frozenset({"add_generation_prompt", "messages", "tools"})


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A chat's prompt, and how its reply is kept to a form and read.

    Attributes:
        ids: the prompt's tokens.
        stop: the texts that end the reply.
        make_parser: makes what finds the calls in a reply.
        marks: how the model marks its thoughts; None where it has none, or they are not separated.
        processors: make what changes the logits, for each reply anew.
        ignored: the options that have no effect with this model.
        shown: special tokens that mark thoughts or calls, and are to be in the reply's text.
    """

    ids: list[int]
    stop: tuple[str, ...]
    make_parser: Callable[[], ToolParser]
    marks: ThinkingMarks | None
    processors: Sequence[Callable[[], Any]]
    ignored: tuple[str, ...]
    shown: tuple[str, ...] = ()


def make_chat_prompt(request: ChatRequest, model: LoadedModel, *, max_tokens: int) -> ChatPrompt:
    """Make the prompt of a request.

    Args:
        request: the request.
        model: the model that will answer.
        max_tokens: how many tokens the reply is to have room for, where older turns may be left
            out to make it.

    Raises:
        ApiError: something of the request cannot be done with this model.
        PromptTooLong: the messages do not fit the context.
        TemplateError: there is no template, or it does not take these messages.
    """
    tokenizer = prompt_tokenizer(model)
    offered, template, ignored = _make_template(request, model)
    messages = offered.messages
    continued = isinstance(template, ContinuedTemplate)
    if not request.truncation_length:
        _check_last(messages, tokenizer)
    ids = _encode(request, model, template, messages, room=max_tokens)
    marks = find_marks(
        model.template, model.tokenizer, ids, str(messages[-1]["content"]) if continued else ""
    )
    processors: list[Callable[[], Any]] = []
    budget = _thinking_budget(request)
    if budget is not None and marks is None:
        ignored.append("thinking_budget")
    if budget is not None and marks is not None:
        known = marks
        processors.append(lambda: ThinkingBudget(len(ids), budget, known, tokenizer.tokenizer))
    mask = _make_mask(request, model, offered, marks, tokenizer, begin=len(ids))
    if mask is not None:
        processors.append(mask)
    separate = request.reasoning_format != "none" and request.separate_reasoning is not False
    return ChatPrompt(
        ids,
        (*template.stop, *offered.stop, *((CALL,) if marks and marks.has_channels else ())),
        offered.make_parser,
        marks if separate else None,
        processors,
        tuple(ignored),
        (*offered.shown, *(marks.shown if marks is not None else ())),
    )


def encode_chat(request: ChatRequest, model: LoadedModel) -> list[int]:
    """Tokenise a request's conversation as a reply to it would begin, however long it is."""
    offered, template, _ = _make_template(request, model)
    generation = request.add_generation_prompt is not False
    return template.encode(offered.messages, model.tokenizer, add_generation_prompt=generation)


def _make_template(
    request: ChatRequest, model: LoadedModel
) -> tuple[OfferedTools, Template, list[str]]:
    """Return the tools as they are offered, the template, and the options without effect."""
    offered = offer_tools(request, model, template_messages(request.messages))
    kwargs = request.chat_template_kwargs or {}
    if reserved := sorted(RESERVED & set(kwargs)):
        raise invalid(
            f"chat_template_kwargs sets {reserved[0]}; send it as an option of the request",
            param=f"chat_template_kwargs.{reserved[0]}",
        )
    variables = thinking_variables(request)
    unused = set(unused_variables(model.template, variables))
    ignored = [f"chat_template_kwargs.{name}" for name in kwargs if name in unused]
    if request.reasoning_effort is not None and not _has_effect(request, unused):
        ignored.append("reasoning_effort")
    if {"enable_thinking", "thinking"} <= unused:
        both = ("enable_thinking", "thinking")
        ignored += [name for name in both if getattr(request, name) is not None]
    used = {name: value for name, value in variables.items() if name not in unused}
    template: Template = set_variables(offered.template, used, model, param="chat_template_kwargs")
    if _continues(request):
        template = ContinuedTemplate(template)
    return offered, template, ignored


def _has_effect(request: ChatRequest, unused: set[str]) -> bool:
    """Return whether reasoning_effort changes the prompt."""
    if "reasoning_effort" not in unused:
        return True
    return request.reasoning_effort == "none" and not {"enable_thinking", "thinking"} <= unused


def _continues(request: ChatRequest) -> bool:
    """Return whether the reply is to go on with the last message.

    Raises:
        ApiError: that is not the assistant's, or calls a function.
    """
    last = request.messages[-1]
    if not request.continue_final_message and not last.prefix:
        return False
    param = "continue_final_message" if request.continue_final_message else "prefix"
    if request.continue_final_message and request.add_generation_prompt:
        raise invalid(
            "continue_final_message and add_generation_prompt exclude each other; send one",
            param=param,
        )
    if last.role != "assistant" or not isinstance(last.content, str) or last.tool_calls:
        raise invalid(
            f"{param} goes on with a text of the assistant's, and the last message is none",
            param=param,
        )
    return True


def _encode(
    request: ChatRequest,
    model: LoadedModel,
    template: Template,
    messages: list[dict[str, Any]],
    *,
    room: int,
) -> list[int]:
    """Tokenise the messages; where they may be cut, leave out as few of the oldest as needed."""
    generation = request.add_generation_prompt is not False

    def encode(kept: list[dict[str, Any]]) -> list[int]:
        ids = template.encode(kept, model.tokenizer, add_generation_prompt=generation)
        model.check_fits(ids)
        return ids

    if request.truncation_length is None:
        return encode(messages)
    limit = max(min(request.truncation_length, model.context) - room, 1)
    shortened = _shortened(messages)

    def fitting(count: int) -> list[int] | None:
        try:
            ids = encode(shortened[count])
        except PromptTooLong:
            return None
        return ids if len(ids) <= limit else None

    if (ids := fitting(0)) is not None:
        return ids
    low, high, best = 1, len(shortened) - 1, None
    while low <= high:
        middle = (low + high) // 2
        ids = fitting(middle)
        if ids is None:
            low = middle + 1
        else:
            best, high = ids, middle - 1
    return encode(shortened[-1]) if best is None else best


def _shortened(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """List the conversation, and what is left of it without its oldest turns, one by one."""
    kept: list[Any] = list(messages)
    every = [list(kept)]
    while drop_oldest(kept):
        every.append(list(kept))
    return every


def _check_last(messages: list[dict[str, Any]], tokenizer: PromptTokenizer) -> None:
    """Refuse what the user says last by its length, before it is rendered: every prompt has it.

    Raises:
        PromptTooLong: it cannot fit.
    """
    contents = [message["content"] for message in messages if message["role"] == "user"]
    if contents and isinstance(contents[-1], str):
        tokenizer.check_length(contents[-1].strip())  # as some templates do


def _thinking_budget(request: ChatRequest) -> int | None:
    budget = request.thinking_budget
    if budget is None and request.thinking is not None:
        budget = request.thinking.budget_tokens
    return None if budget is None or budget < 0 else budget


def _write_form(request: ChatRequest, offered: OfferedTools) -> tuple[str, str, bool]:
    """Write the form of a reply as a grammar of Lark.

    Returns:
        The grammar, or "" where any text will do; the field that asks for it; and whether it holds
        within calls alone.

    Raises:
        ApiError: it cannot be written.
    """
    constraint = read_constraint(request)
    if offered.required and offered.write_calls is not None:
        return f"start: calls\n{offered.write_calls()}", "tool_choice", False
    if constraint is None:
        return ("", "", False) if offered.strict is None else (offered.strict(), "tools", True)
    form = write_grammar(constraint)
    if offered.write_calls is None:
        return form, constraint.param, False
    if constraint.kind == "grammar":
        raise invalid(
            f'{constraint.param} leaves no room for calls; send tool_choice "none"',
            param=constraint.param,
        )
    either = form.replace("start:", "start: calls | form\nform:", 1)
    return f"{either}{offered.write_calls()}", constraint.param, False


def _make_mask(
    request: ChatRequest,
    model: LoadedModel,
    offered: OfferedTools,
    marks: ThinkingMarks | None,
    tokenizer: PromptTokenizer,
    *,
    begin: int,
) -> Callable[[], Any] | None:
    """Return what keeps a reply to the form that is asked for; None where there is none.

    Raises:
        ApiError: it cannot be kept to.
    """
    options = MaskOptions()
    if marks is not None and (marks.opened or (marks.has_channels and not marks.closed)):
        options = MaskOptions(after=marks.closing, must_begin=True)
    elif marks is not None and not marks.closed:
        opening = model.tokenizer.get_vocab().get(marks.opening)
        options = MaskOptions(after=marks.closing if opening else "", opening=opening)
    grammar, param, calls_only = _write_form(request, offered)
    if not grammar:
        return None
    if calls_only:
        options = MaskOptions(after=OPEN, repeats=True)
    return make_mask(
        grammar,
        tokenizer.grammar,
        begin=begin,
        param=param,
        options=options,
        end_ids=sorted(model.end_ids(model.template.stop)),
    )
