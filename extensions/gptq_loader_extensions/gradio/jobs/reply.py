"""Write one reply, and show how it grows and how fast.

Nothing here knows the page: a prompt goes in, states of the conversation come out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.gradio.jobs.conversation import ChatState, Ended, Message, Version
from gptq_loader_extensions.gradio.jobs.models import EncodedPrompt, ReplyStart
from gptq_loader_extensions.openai.replies.continuing import ContinuedTemplate
from gptq_loader_extensions.openai.replies.processors import PresencePenalty
from gptq_loader_extensions.openai.replies.thinking import unused_variables
from gptq_loader_extensions.openai.replies.tools import set_variables
from gptq_loader_plugin.chat.thinking import find_marks, make_thought_parser
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gptq_loader_extensions.gradio.jobs.conversation import Conversation
    from gptq_loader_extensions.gradio.jobs.models import Models
    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.generation.generate import Piece
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = [
    "ReplySettings",
    "chat_prompt",
    "raw_prompt",
    "thinking_names",
    "write_reply",
]

# The eye sees no more than about 20 changes a second; every redraw sends the page a message.
REDRAW_SECONDS = 0.05
THINKING = ("enable_thinking", "thinking")  # a template's names for the switch


@dataclass(frozen=True, slots=True)
class ReplySettings:
    """How to write a reply.

    Attributes:
        system: the system message.
        options: how to sample.
        presence: OpenAI's presence penalty.
        frequency: OpenAI's frequency penalty.
        thinking: whether to think; None leaves that to the template.
        adapter: the LoRA adapter to write with, "" for the model alone; None for the one that the
            model was loaded to write with.
    """

    system: str = ""
    options: GenerateOptions = field(default_factory=GenerateOptions)
    presence: float = 0.0
    frequency: float = 0.0
    thinking: bool | None = None
    adapter: str | None = None


DEFAULTS = ReplySettings()


def write_reply(
    models: Models,
    prepare: Callable[[LoadedModel], EncodedPrompt],
    options: GenerateOptions,
    *,
    messages: Conversation = (),
    earlier: Message | None = None,
    continues: bool = False,
    cancel: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ChatState]:
    """Write a reply; yield the conversation as it grows, until it is no longer running.

    A reply that is cancelled keeps the text it has. Without any text there is no reply: the
    question, which is the last message, goes back into the message box.

    Args:
        models: generates the reply.
        prepare: makes the prompt.
        options: how to sample.
        messages: the conversation that the reply is added to, the question last.
        earlier: the reply of which this is another version, or which goes on.
        continues: whether it goes on.
        cancel: ends the reply once it is set.
        clock: returns seconds.

    Raises:
        GPTQLoaderError: no model is loaded, or the prompt does not fit it.
    """
    began = shown = clock()
    first: tuple[float, int] | None = None
    growing = _Growing(earlier, continues=continues)
    kept = () if earlier is None else (earlier,)
    before = kept if continues else ()
    reading = ChatState((*messages, *before), "Reading the prompt …", running=True)
    yield reading
    start = ReplyStart(0, 0)
    for event in models.stream(prepare, options, cancel):
        if isinstance(event, ReplyStart):
            start = event
            growing.parse(event)
            yield replace(reading, warning=event.warning)
            continue
        now = clock()
        growing.feed(event, now)
        first = first or (now, event.tokens)
        if event.finish is None and now - shown < REDRAW_SECONDS:
            continue
        shown = now
        if event.finish == "cancelled" and messages and not growing.has_text:
            yield _without_text(messages, earlier)
            return
        status = _speed(event.tokens, start, began=began, first=first, now=now)
        ended = _why_ended(event, options)
        status += _describe_end(ended, options)
        reply = (growing.message(ended),) if growing.has_text or event.finish else before
        yield ChatState((*messages, *reply), status, running=event.finish is None)


class _Growing:
    """A reply as it grows: its thought, its text, and how long it thought.

    Args:
        earlier: the reply of which it is another version, or which goes on.
        continues: whether that goes on.
    """

    def __init__(self, earlier: Message | None, *, continues: bool) -> None:
        self._earlier, self._continues = earlier, continues
        begun = earlier.version() if earlier is not None and continues else Version()
        self._begun, self._content, self._thought = begun, begun.content, begun.thought
        self._parser = make_thought_parser(None)
        self._thought_from: float | None = None
        self._seconds: float | None = begun.seconds
        self.has_text = False

    def parse(self, start: ReplyStart) -> None:
        """Begin to separate the thought from the answer."""
        answers = bool(self._begun.content) or start.marks is None or start.marks.closed
        self._parser = make_thought_parser(None if answers else start.marks)

    def feed(self, piece: Piece, now: float) -> None:
        """Add a piece."""
        thinks = self._parser.thinking
        thought, answer = self._parser.feed(piece.text)
        if piece.finish:
            more, rest = self._parser.finish()
            thought, answer = thought + more, answer + rest
        if thinks or thought or self._parser.thinking:
            self._thought_from = self._thought_from or now
            self._seconds = (self._begun.seconds or 0.0) + now - self._thought_from
        self._thought += thought
        self._content += answer
        self.has_text = self.has_text or bool(thought or answer)

    def message(self, ended: Ended) -> Message:
        """Return the reply so far."""
        version = Version(
            content=self._content,
            thought=self._thought,
            seconds=self._seconds if self._thought else None,
            ended=ended,
        )
        if self._earlier is None:
            return Message(role="assistant", **version.model_dump())
        return self._earlier.change(version) if self._continues else self._earlier.add(version)


def chat_prompt(
    messages: Sequence[Mapping[str, Any]],
    settings: ReplySettings = DEFAULTS,
    *,
    continues: bool = False,
) -> Callable[[LoadedModel], EncodedPrompt]:
    """Make a prompt of messages by the model's template; the oldest turns go where it is full.

    Args:
        messages: the conversation, with its system message.
        settings: how to write the reply.
        continues: whether the reply goes on with the last message.
    """

    def prepare(model: LoadedModel) -> EncodedPrompt:
        template = _switched(model, settings.thinking)
        marks = find_marks(template, model.tokenizer, []) if continues else None
        turns = [dict(message) for message in messages]
        if continues:
            last = turns[-1]
            thought = last.pop("reasoning_content", "")
            if thought and marks is not None:
                closed = f"\n{marks.closing}\n\n" if last["content"] else ""
                last["content"] = f"{marks.opening}\n{thought}{closed}{last['content']}"
            template = ContinuedTemplate(template)
        ids, warning = model.encode_chat(turns, when_too_long="drop-oldest", template=template)
        return EncodedPrompt(
            ids,
            template.stop,
            warning,
            find_marks(
                model.template, model.tokenizer, ids, turns[-1]["content"] if continues else ""
            ),
            _penalties(settings, len(ids)),
            _adapter(model, settings.adapter),
        )

    return prepare


def raw_prompt(
    text: str, settings: ReplySettings = DEFAULTS
) -> Callable[[LoadedModel], EncodedPrompt]:
    """Make a prompt of a text as it was typed; special tokens in it count."""

    def prepare(model: LoadedModel) -> EncodedPrompt:
        ids = model.encode(text)
        penalties = _penalties(settings, len(ids))
        adapter = _adapter(model, settings.adapter)
        return EncodedPrompt(ids, processors=penalties, adapter=adapter)

    return prepare


def thinking_names(template: Template) -> list[str]:
    """Return the names that a template has for the switch of thinking; none where it has none."""
    unused = unused_variables(template, dict.fromkeys(THINKING))
    return [name for name in THINKING if name not in unused]


def _switched(model: LoadedModel, thinking: bool | None) -> Template:  # noqa: FBT001 - the switch
    """Return the model's template, told whether to think where it has a switch."""
    names = [] if thinking is None else thinking_names(model.template)
    return set_variables(
        model.template, dict.fromkeys(names, thinking), model, param="chat_template_kwargs"
    )


def _adapter(model: LoadedModel, name: str | None) -> str | None:
    """Return the adapter to write a reply with.

    Raises:
        OptionInvalid: the model has none of that name.
    """
    if name is None:
        return model.adapter
    if name and (model.adapters is None or name not in model.adapters.updates):
        raise OptionInvalid(
            f"the adapter {name} is not loaded",
            hint="choose another beside the model's name, or load the model that has it",
        )
    return name or None


def _penalties(settings: ReplySettings, begin: int) -> tuple[PresencePenalty, ...]:
    if not settings.presence and not settings.frequency:
        return ()
    return (PresencePenalty(begin, presence=settings.presence, frequency=settings.frequency),)


def _without_text(messages: Conversation, earlier: Message | None) -> ChatState:
    """Go back to what there was before a reply that was cancelled without any text."""
    if earlier is not None:
        return ChatState((*messages, earlier), "Stopped.")
    return ChatState(messages[:-1], "Stopped.", draft=messages[-1].content)


def _speed(
    tokens: int, start: ReplyStart, *, began: float, first: tuple[float, int], now: float
) -> str:
    """Describe how many tokens there are and how fast they come; reading the prompt is apart."""
    seconds, count = now - first[0], tokens - first[1]
    speed = f"{tokens:,} {'token' if tokens == 1 else 'tokens'}"
    if count and seconds > 0:
        speed += f", {count / seconds:.1f} a second"
    used = start.prompt_tokens + tokens
    return (
        f"{speed}; the first after {first[0] - began:.2f} s; "
        f"{used:,} of {start.context:,} of the context used"
        + (f"; with the adapter {start.adapter}" if start.adapter else "")
    )


def _why_ended(piece: Piece, options: GenerateOptions) -> Ended:
    """Return why a reply ended, where it did not end by itself."""
    if piece.finish == "cancelled":
        return "stopped"
    if piece.finish != "length":
        return ""
    return "length" if piece.tokens >= options.max_new_tokens else "context"


def _describe_end(ended: Ended, options: GenerateOptions) -> str:
    if ended == "stopped":
        return "; stopped"
    if ended == "length":
        return f"; cut off at {options.max_new_tokens:,} new tokens (Max new tokens)"
    return "; cut off where the context is full" if ended else ""
