"""Find out how a model marks its thoughts, and separate them from its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.replies.marks import overlap
from gptq_loader_plugin.chat.templates import JinjaTemplate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from gptq_loader_extensions.openai.schema.schemas import ChatRequest
    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = [
    "ThinkingBudget",
    "ThinkingMarks",
    "ThoughtParser",
    "find_marks",
    "thinking_variables",
    "unused_variables",
]

# What opens and closes a thought: of Qwen3, DeepSeek R1, GLM and most others; Magistral; Seed-OSS.
MARKS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
TAIL = 16  # tokens of a prompt's end, which have what opens a thought where it does


@dataclass(frozen=True, slots=True)
class ThinkingMarks:
    """How a model marks a thought.

    Attributes:
        opening: what comes before it.
        closing: what comes after it.
        opened: whether the prompt has opened it already.
        closed: whether the prompt has closed it already, so that there is none.
    """

    opening: str
    closing: str
    opened: bool = False
    closed: bool = False


def find_marks(
    template: Template, model: LoadedModel, ids: Sequence[int], continued: str = ""
) -> ThinkingMarks | None:
    """Return the marks of a model that thinks, by its template; None for any other.

    Args:
        template: the model's.
        model: the model.
        ids: a prompt's tokens.
        continued: the message of the assistant's that the reply goes on with.
    """
    if not isinstance(template, JinjaTemplate):
        return None
    for opening, closing in MARKS:
        if closing not in template.text:
            continue
        tail = str(model.tokenizer.decode(list(ids[-TAIL:]))).rstrip()
        opened = tail.endswith(opening) or continued.rfind(opening) > continued.rfind(closing)
        return ThinkingMarks(opening, closing, opened, tail.endswith(closing))
    return None


def thinking_variables(request: ChatRequest) -> dict[str, Any]:
    """Return what a request tells the template: whether to think and how hard, and its own values.

    Under all the names that templates have for it.
    """
    variables: dict[str, Any] = {}
    thinks = request.enable_thinking
    if thinks is None and request.thinking is not None:
        thinks = request.thinking.type != "disabled"
    if request.reasoning_effort is not None:
        variables["reasoning_effort"] = request.reasoning_effort
        if thinks is None and request.reasoning_effort == "none":
            thinks = False
    if thinks is not None:
        variables |= {"enable_thinking": thinks, "thinking": thinks}
    return variables | (request.chat_template_kwargs or {})


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


class ThinkingBudget:
    """End a thought after so many tokens.

    Args:
        begin: where the reply begins in the sequence.
        budget: how many tokens the thought may have.
        marks: how it is marked.
        tokenizer: the model's.
    """

    def __init__(
        self,
        begin: int,
        budget: int,
        marks: ThinkingMarks,
        tokenizer: Any,  # noqa: ANN401 - transformers'
    ) -> None:
        self._begin, self._budget = begin, budget
        self._opened = marks.opened
        self._tokenizer = tokenizer
        self._marks = marks
        self._closing: list[int] = tokenizer(f"\n{marks.closing}", add_special_tokens=False)[
            "input_ids"
        ]
        self._forced = 0  # of the tokens that close the thought
        self._ended = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits [1, vocabulary]; past the budget, those of the thought's end alone."""
        if self._ended:
            return scores
        reply = input_ids[0, self._begin :].tolist()
        if not self._forced:
            text = str(self._tokenizer.decode(reply))
            if not self._opened and len(reply) >= TAIL and self._marks.opening not in text:
                self._ended = True
            if self._marks.closing in text:
                self._ended = True
            opened = self._opened or self._marks.opening in text
            if self._ended or not opened or len(reply) < self._budget:
                return scores
        token = self._closing[self._forced]
        self._forced += 1
        self._ended = self._forced == len(self._closing)
        forced = scores.new_full(scores.shape, float("-inf"))
        forced[0, token] = 0
        return forced


def unused_variables(template: Template, variables: Mapping[str, Any]) -> list[str]:
    """List the variables that a template does not name: they have no effect."""
    text = template.text if isinstance(template, JinjaTemplate) else ""
    return [name for name in variables if name not in text]
