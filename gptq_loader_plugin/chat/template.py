"""What a template is: a way to make a prompt of messages, and to know where a reply ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin.chat.messages import Message

__all__ = ["Template"]


@runtime_checkable
class Template(Protocol):
    """A way to make a prompt of messages.

    A message is a mapping with `role` ("system", "user", "assistant") and `content`.
    """

    @property
    def name(self) -> str:
        """What users pass as `template=`."""
        ...

    @property
    def source(self) -> str:
        """Where it came from, for people."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """The texts that end a reply."""
        ...

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Make the prompt a person reads."""
        ...

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Make the token ids the model gets; contents never become control tokens."""
        ...
