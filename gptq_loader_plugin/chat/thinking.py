"""How a model marks its thoughts, by its template; and thoughts apart from the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.chat.channels import (
    ANALYSIS,
    CHANNEL_TOKENS,
    FINAL,
    ChannelParser,
    uses_channels,
)
from gptq_loader_plugin.chat.marks import overlap
from gptq_loader_plugin.chat.templates import JinjaTemplate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.chat.template import Template

__all__ = ["TAIL", "ThinkingMarks", "ThoughtParser", "find_marks", "make_thought_parser"]

# What opens and closes a thought: of Qwen3, DeepSeek R1, GLM and others; Magistral; Seed-OSS;
# Command A; EXAONE; Kimi; Gemma 4.
MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<thought>", "</thought>"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|channel>thought", "<channel|>"),
)
TAIL = 16  # tokens of a prompt's end, which have what opens a thought where it does


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """How a model marks a thought.

    Attributes:
        opening: what comes before it.
        closing: what comes after it.
        opened: whether the prompt has opened it already.
        closed: whether the prompt has closed it already, so that there is none.
        ending: what a thought that is cut off ends with.
        shown: tokens that stand for these marks, though a tokenizer's text may lack them.
    """

    opening: str
    closing: str
    opened: bool = False
    closed: bool = False
    ending: str = ""
    shown: tuple[str, ...] = ()

    @property
    def has_channels(self) -> bool:
        """Whether the whole reply is in channels, of which one is for thoughts."""
        return self.opening == ANALYSIS


def find_marks(
    template: Template,
    tokenizer: Any,  # noqa: ANN401 - transformers'
    ids: Sequence[int],
    continued: str = "",
) -> ThinkingMarks | None:
    """Return the marks of a model that thinks, by its template; None for any other.

    Args:
        template: the model's.
        tokenizer: the model's.
        ids: a prompt's tokens.
        continued: the message of the assistant's that the reply goes on with.
    """
    if not isinstance(template, JinjaTemplate):
        return None
    pairs = ((ANALYSIS, FINAL),) if uses_channels(template.text) else MARKS
    for opening, closing in pairs:
        channels = opening == ANALYSIS
        if not channels and closing not in template.text:
            continue
        tail = str(tokenizer.decode(list(ids[-TAIL:]))).rstrip()
        return ThinkingMarks(
            opening,
            closing,
            tail.endswith(opening) or continued.rfind(opening) > continued.rfind(closing),
            tail.endswith(closing),
            f"<|end|><|start|>assistant{FINAL}" if channels else f"\n{closing}",
            CHANNEL_TOKENS if channels else (opening, closing),
        )
    return None


def make_thought_parser(
    marks: ThinkingMarks | None, *, calls: bool = False
) -> ThoughtParser | ChannelParser:
    """Make what separates the thoughts of a reply from the rest.

    Args:
        marks: how they are marked; None where all is answer.
        calls: whether the model may call functions.
    """
    if marks is not None and marks.has_channels:
        return ChannelParser(opened=marks.opened, closed=marks.closed, calls=calls)
    return ThoughtParser(marks)


class ThoughtParser:
    """Separate the thoughts at a reply's beginning from the rest.

    Args:
        marks: how they are marked; None where all is answer.
    """

    def __init__(self, marks: ThinkingMarks | None) -> None:
        self._marks = marks
        self._held = ""
        self._state = "answer"
        if marks is not None:
            self._state = "thought" if marks.opened else "beginning"
        self._blank = True  # whether what comes next is the first of its kind

    @property
    def thinking(self) -> bool:
        """Whether the thought has not ended."""
        return self._state == "thought"

    def feed(self, text: str) -> tuple[str, str]:
        """Feed a chunk; return what is surely thought, and what is surely answer."""
        if self._marks is None:
            return "", text
        self._held += text
        thought = ""
        if self._state == "beginning":
            begun = self._held.lstrip()
            if begun.startswith(self._marks.opening):
                self._state = "thought"
                self._held = begun.removeprefix(self._marks.opening)
            elif self._marks.opening.startswith(begun):
                return "", ""
            else:
                self._state, self._blank = "answer", False
        if self._state == "thought":
            thought, closed, rest = self._held.partition(self._marks.closing)
            if closed:
                thought = self._shown(thought.rstrip())
                self._state, self._held, self._blank = "answer", rest, True
            else:
                whole = thought[: len(thought) - overlap(thought, self._marks.closing)].rstrip()
                self._held = thought[len(whole) :]
                return self._shown(whole), ""
        answer, self._held = self._held, ""
        return thought, self._shown(answer)

    def finish(self) -> tuple[str, str]:
        """Return what was held back, at the reply's end."""
        held, self._held = self._held, ""
        if self._state == "thought":
            return self._shown(held.rstrip()), ""
        return "", held

    def _shown(self, text: str) -> str:
        """Leave out the whitespace before the first word."""
        if self._blank:
            text = text.lstrip()
            self._blank = not text
        return text
