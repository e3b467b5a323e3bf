"""Turn messages into a prompt, and know where a reply ends.

A template is ChatML, the checkpoint's own jinja, the one its model card gives, or a plugin's. Text
that a user typed never becomes a control token: a content that spells `<|im_end|>` is tokenised
as those nine characters and not as the end of a turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.chat.encode import encode_messages
from gptq_loader_plugin.chat.jinja_process import (
    RENDER_SECONDS,
    StoppedTemplateError,
    render_jinja,
)
from gptq_loader_plugin.chat.messages import check_messages
from gptq_loader_plugin.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin.chat.messages import Message

__all__ = [
    "CHATML_END",
    "CHATML_START",
    "CardTemplate",
    "ChatML",
    "JinjaTemplate",
]

CHATML_START = "<|im_start|>"
CHATML_END = "<|im_end|>"
# A reply's end, as a template writes it right after an assistant's content.
END_MARK = re.compile(r"\s*(<[^<>\s]{1,40}>|\[/?[A-Z]{2,20}\])")
# Who speaks next, at the end of what a card writes before {prompt}: "### Instruction:", "USER:",
# "[INST]", "<|user|>"; on a line of its own a header may have several words.
USER_HEADER = re.compile(
    r"(?:(?:^|\n)(?P<line>[^\n]{0,40}:)|(?P<word>[^\s.,:;]+:)|(?P<mark>\[[A-Z]+\]|<[^<>\s]+>))\s*\Z"
)
USER_PROBE, REPLY_PROBE, SYSTEM_PROBE = "gptqquestion", "gptqprobe", "gptqsystem"
PROBES = (("user", USER_PROBE), ("assistant", REPLY_PROBE))
PROBE_SECONDS = 1.0
# The names of a message's reasoning, of which a template reads one; transformers gives it all.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Makes a list of parts of every content that is a text. A namespace, since a loop sets nothing
# outside; what ends in {{ }} leaves the line break that a template may begin with.
AS_PARTS = (
    "{% set contents = namespace(messages=[]) %}{% for message in messages %}"
    "{% if message['content'] is string and message['role'] in ROLES %}"
    "{% set contents.messages = contents.messages + [dict(message, content="
    "[{'type': 'text', 'text': message['content']}])] %}"
    "{% else %}{% set contents.messages = contents.messages + [message] %}{% endif %}{% endfor %}"
    "{% set messages = contents.messages %}{{ '' }}"
)
FIXED_SYSTEM = re.compile(r"<<SYS>>.*?<</SYS>>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class ChatML:
    """ChatML: each turn is `<|im_start|>ROLE`, a newline, the content, `<|im_end|>`, a newline.

    https://github.com/openai/openai-python/blob/v0.28.1/chatml.md; the prompt ends with the
    assistant's header and exactly one newline.
    """

    name: str = "chatml"
    source: str = "ChatML"
    stop: tuple[str, ...] = (CHATML_END,)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Make the prompt a person reads.

        Raises:
            TemplateError: a message is not one.
        """
        turns = [
            f"{CHATML_START}{message['role']}\n{message['content']}{CHATML_END}\n"
            for message in check_messages(messages)
        ]
        if add_generation_prompt:
            turns.append(f"{CHATML_START}assistant\n")
        return "".join(turns)

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Make the token ids the model gets; contents never become control tokens."""
        return encode_messages(
            self, messages, tokenizer, add_generation_prompt=add_generation_prompt, add_bos=True
        )


@dataclass(frozen=True, slots=True)
class JinjaTemplate:
    """A checkpoint's own chat template, rendered as transformers does.

    Attributes:
        text: the jinja source.
        tokens: what the template may name: `bos_token`, `eos_token` and such.
    """

    text: str
    name: str = "checkpoint"
    source: str = "chat_template.jinja"
    tokens: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Make the prompt a person reads.

        Raises:
            TemplateError: the template is broken, or refuses these messages.
        """
        return self._render(
            [_with_reasoning(message) for message in check_messages(messages)],
            add_generation_prompt=add_generation_prompt,
        )

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Make the token ids the model gets; contents never become control tokens."""
        return encode_messages(
            self, messages, tokenizer, add_generation_prompt=add_generation_prompt, add_bos=False
        )

    def probed(self) -> JinjaTemplate:
        """Find out where a reply ends, and in which form the template takes contents.

        Those of models with pictures take a list of parts, and leave out a content that is a text;
        such a template is given what makes a list of it. One that goes beyond a limit is asked
        nothing more.
        """
        try:
            return self._probed()
        except StoppedTemplateError:
            return self

    def _probed(self) -> JinjaTemplate:
        turns = [_turn("user", USER_PROBE), _turn("assistant", REPLY_PROBE)]
        text = self._probe(turns)
        parts = {role for role, probe in PROBES if probe not in text}
        template = self
        if parts:
            in_parts = self._in_parts(parts)
            probed = in_parts._probe(turns)  # noqa: SLF001 - another of its own
            if all(probe in probed for _, probe in PROBES):
                template, text = in_parts, probed
        system = _turn("system", SYSTEM_PROBE)
        if SYSTEM_PROBE not in template._probe([system, *turns]):  # noqa: SLF001
            in_parts = self._in_parts({*parts, "system"})
            if SYSTEM_PROBE in in_parts._probe([system, *turns]):  # noqa: SLF001
                template = in_parts
        mark = END_MARK.match(text.partition(REPLY_PROBE)[2])
        return replace(template, stop=(mark[1],)) if mark else template

    def _in_parts(self, roles: set[str]) -> JinjaTemplate:
        """Give a template the contents of some roles as parts, and the tools' with the user's."""
        listed = sorted(roles | ({"tool"} if "user" in roles else set()))
        return replace(self, text=AS_PARTS.replace("ROLES", str(listed)) + self.text)

    def _probe(self, messages: Sequence[Message]) -> str:
        """Render words of our own, or nothing where it refuses them."""
        try:
            return self._render(messages, add_generation_prompt=False, seconds=PROBE_SECONDS)
        except StoppedTemplateError:
            raise
        except TemplateError:
            return ""

    def _render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        seconds: float = RENDER_SECONDS,
    ) -> str:
        variables = {
            "tools": None,
            "documents": None,
            **self.tokens,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        return render_jinja(self.text, variables, source=self.source, seconds=seconds)


@dataclass(frozen=True, slots=True)
class CardTemplate:
    """A model card's `prompt_template`: one turn, with `{prompt}` and maybe `{system_message}`.

    Several turns are single turns one after the other, each reply where the template ends.

    Attributes:
        text: the template.
    """

    text: str
    name: str = "card"
    source: str = "README.md"

    @property
    def stop(self) -> tuple[str, ...]:
        """What opens the user's turn, such as `### Instruction:`: a reply ends there."""
        before = self._later_turn().partition("{prompt}")[0].strip()
        return (before,) if before and USER_HEADER.search(before) else ()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Make the prompt a person reads.

        Raises:
            TemplateError: the template has no place for a system message, or roles do not
                alternate.
        """
        turns = check_messages(messages)
        system = None
        if turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
            if "{system_message}" not in self.text:
                raise TemplateError(
                    f"the prompt template of {self.source} has no place for a system message",
                    hint="put it at the start of the first user message, or choose another "
                    'template: template="chatml"',
                )
        roles = [message["role"] for message in turns]
        if roles != [("user", "assistant")[i % 2] for i in range(len(turns))] or not turns:
            raise TemplateError(
                f"the prompt template of {self.source} takes user and assistant by turns; these "
                f"are {', '.join(roles) or 'none'}",
                hint="join messages of one role, and begin with the user's",
            )
        text = ""
        for i, message in enumerate(turns):
            if message["role"] == "assistant":
                text += f"{message['content']}\n"
                continue
            before, _, after = self._turn(first=i == 0, system=system).partition("{prompt}")
            before = before.replace("{system_message}", system or "")
            answered = add_generation_prompt or i + 1 < len(turns)
            text += before + message["content"] + (after if answered else "")
        return text

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: PreTrainedTokenizerBase,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Make the token ids the model gets; contents never become control tokens."""
        return encode_messages(
            self, messages, tokenizer, add_generation_prompt=add_generation_prompt, add_bos=True
        )

    def _turn(self, *, first: bool, system: str | None) -> str:
        """Choose the form of a turn: only the first has a preamble or a system message."""
        whole = first and (system is not None or "{system_message}" not in self.text)
        return self.text if whole else self._later_turn()

    def _later_turn(self) -> str:
        """Cut the template down to the user's header, `{prompt}` and the assistant's header."""
        before, _, after = FIXED_SYSTEM.sub("", self.text).partition("{prompt}")
        header = USER_HEADER.search(before)
        if header is not None:
            before = header[0].lstrip("\n")
        else:
            before = before.rpartition("{system_message}")[2].lstrip()
        return f"{before}{{prompt}}{after}"


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give a message's reasoning under every name that templates have for it."""
    values = (message.get(name) for name in REASONING)
    reasoning = next((text for text in values if text is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
