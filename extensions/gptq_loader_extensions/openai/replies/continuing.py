"""Render a conversation so that the reply goes on with the assistant's last message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptq_loader_plugin.chat.encode import encode_messages
from gptq_loader_plugin.chat.templates import JinjaTemplate
from gptq_loader_plugin.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin.chat.messages import Message
    from gptq_loader_plugin.chat.template import Template

__all__ = ["ContinuedTemplate"]

MARK = "\uf8fe\uf8ffend\uf8ff\uf8fe"  # of private use, and no content has it


@dataclass(frozen=True, slots=True)
class ContinuedTemplate:
    """A template whose prompt ends where the last message does.

    Attributes:
        inner: renders the messages.
    """

    inner: Template

    @property
    def name(self) -> str:
        """What users pass as `template=`."""
        return self.inner.name

    @property
    def source(self) -> str:
        """Where it came from, for people."""
        return self.inner.source

    @property
    def stop(self) -> tuple[str, ...]:
        """The texts that end a reply."""
        return self.inner.stop

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Make the prompt a person reads.

        Raises:
            TemplateError: the template leaves out what the last message says.
        """
        del add_generation_prompt
        last = {**messages[-1], "content": f"{messages[-1]['content']}{MARK}"}
        text = self.inner.render([*messages[:-1], last], add_generation_prompt=False)
        before, marked, _ = text.rpartition(MARK)
        if not marked:
            raise TemplateError(
                f"the chat template of {self.source} does not write the last message as it is",
                hint="leave continue_final_message out",
            )
        return before

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Make the token ids the model gets; contents never become control tokens."""
        return encode_messages(
            self,
            messages,
            tokenizer,
            add_generation_prompt=add_generation_prompt,
            add_bos=not isinstance(self.inner, JinjaTemplate),
        )
