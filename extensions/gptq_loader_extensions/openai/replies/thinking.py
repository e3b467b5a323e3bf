"""What a request says of thinking: whether, how hard, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.chat.templates import JinjaTemplate
from gptq_loader_plugin.chat.thinking import TAIL

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from gptq_loader_extensions.openai.schema.schemas import ChatRequest
    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.chat.thinking import ThinkingMarks

__all__ = ["ThinkingBudget", "thinking_variables", "unused_variables"]


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
        self._closing: list[int] = tokenizer(marks.ending, add_special_tokens=False)["input_ids"]
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
