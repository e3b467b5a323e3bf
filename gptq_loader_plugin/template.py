"""Turn messages into a prompt, and know where a reply ends.

A template is ChatML, the checkpoint's own jinja, the one its model card gives, or a plugin's. Text
that a user typed never becomes a control token: a content that spells `<|im_end|>` is tokenised
as those nine characters and not as the end of a turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from gptq_loader_plugin.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    Message = Mapping[str, Any]

__all__ = [
    "CHATML_END",
    "CHATML_START",
    "CardTemplate",
    "ChatML",
    "JinjaTemplate",
    "Template",
    "encode_messages",
]

CHATML_START = "<|im_start|>"
CHATML_END = "<|im_end|>"
ROLES = ("system", "user", "assistant", "tool")
STAND_IN = "\ue000{}\ue001"  # private-use characters around a number; no text has them


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
            for message in _checked(messages)
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
            self, messages, tokenizer, add_generation_prompt=add_generation_prompt, begin=True
        )


@dataclass(frozen=True, slots=True)
class JinjaTemplate:
    """A checkpoint's own chat template, rendered by transformers.

    Attributes:
        text: the jinja source.
        tokens: what the template may name: `bos_token`, `eos_token` and such.
    """

    text: str
    name: str = "checkpoint"
    source: str = "chat_template.jinja"
    tokens: Mapping[str, str] = field(default_factory=dict)
    stop: tuple[str, ...] = ()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Make the prompt a person reads.

        Raises:
            TemplateError: the template is broken, or refuses these messages.
        """
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            render: Any = render_jinja_template
            rendered, _ = render(
                conversations=[[dict(message) for message in _checked(messages)]],
                chat_template=self.text,
                add_generation_prompt=add_generation_prompt,
                **self.tokens,
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise TemplateError(
                f"the chat template of {self.source} does not take these messages: {error}",
                hint="leave out the system message, or alternate user and assistant; or choose "
                'another template: template="chatml"',
            ) from error
        text: str = rendered[0]
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
            self, messages, tokenizer, add_generation_prompt=add_generation_prompt, begin=False
        )

    def with_stop(self) -> JinjaTemplate:
        """Find what the template writes right after an assistant's content, where a reply ends."""
        probe = "gptqprobe"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": probe}]
        try:
            text = self.render(turns, add_generation_prompt=False)
        except TemplateError:
            return self
        after = text.partition(probe)[2]
        mark = re.match(r"\s*(<[^<>\s]{1,40}>|\[/?[A-Z]{2,20}\])", after)
        return replace(self, stop=(mark[1],)) if mark else self


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
        """The line that opens the user's turn, such as `### Instruction:`: a reply ends there."""
        before = self._turn().partition("{prompt}")[0].strip()
        header = before.splitlines()[-1].strip() if before else ""
        return (header,) if header else ()

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Make the prompt a person reads.

        Raises:
            TemplateError: the template has no place for a system message, or roles do not
                alternate.
        """
        turns = list(_checked(messages))
        system = ""
        if turns and turns[0]["role"] == "system":
            system = str(turns.pop(0)["content"])
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
            turn = self.text.replace("{system_message}", system) if i == 0 else self._turn()
            text += turn.replace("{prompt}", str(message["content"]))
        if len(turns) % 2 and not add_generation_prompt:
            return text[: text.rindex(str(turns[-1]["content"])) + len(str(turns[-1]["content"]))]
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
            self, messages, tokenizer, add_generation_prompt=add_generation_prompt, begin=True
        )

    def _turn(self) -> str:
        """The template of a later turn: what comes after the system message."""
        return self.text.rpartition("{system_message}")[2].lstrip("\n")


def encode_messages(
    template: Template,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
    begin: bool,
) -> list[int]:
    """Tokenise a template's prompt so that no content becomes a control token.

    Where no content spells a control token, the prompt is tokenised in one go, as training code
    does. Where one does, its control tokens are rendered as stand-ins, the prompt is cut at the
    template's own control tokens, and the text between is tokenised with `split_special_tokens`.

    Args:
        template: renders the messages.
        messages: with contents as users typed them.
        tokenizer: the checkpoint's.
        add_generation_prompt: whether to end with the assistant's header.
        begin: whether to put the tokenizer's beginning-of-text token first where it does so by
            itself and the prompt does not have it.
    """
    controls = _controls(tokenizer)
    start = _beginning(tokenizer) if begin else []
    spelled = [
        token
        for token in controls
        if any(token in str(message.get("content", "")) for message in messages)
    ]
    if not spelled:
        text = template.render(messages, add_generation_prompt=add_generation_prompt)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return _joined(start, ids)
    stand_ins = {token: STAND_IN.format(i) for i, token in enumerate(spelled)}
    disguised = [
        {**message, "content": _replace(str(message.get("content", "")), stand_ins)}
        for message in messages
    ]
    text = template.render(disguised, add_generation_prompt=add_generation_prompt)
    restored = {stand_in: token for token, stand_in in stand_ins.items()}
    cut = re.compile("|".join(re.escape(it) for it in sorted(controls, key=len, reverse=True)))
    ids = []
    end = 0
    for match in cut.finditer(text):
        ids += _plain(_replace(text[end : match.start()], restored), tokenizer)
        ids.append(controls[match[0]])
        end = match.end()
    ids += _plain(_replace(text[end:], restored), tokenizer)
    return _joined(start, ids)


def _checked(messages: Sequence[Message]) -> Sequence[Message]:
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise TemplateError(
                f"{message!r} is no message",
                hint='write {"role": "user", "content": "..."}; roles are ' + ", ".join(ROLES),
            )
    return messages


def _controls(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every token that text can spell and that stands for more than its characters."""
    added: dict[str, int] = tokenizer.get_added_vocab()
    controls = {token: added.get(token, -1) for token in tokenizer.all_special_tokens}
    marks = (("<", "["), (">", "]"))
    controls.update(
        {
            token: index
            for token, index in added.items()
            if token.startswith(marks[0]) and token.endswith(marks[1])
        }
    )
    return {
        token: index if index >= 0 else int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]
        for token, index in controls.items()
        if token
    }


def _plain(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not text:
        return []
    ids: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return ids


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _joined(start: list[int], ids: list[int]) -> list[int]:
    return ids if ids[: len(start)] == start else start + ids


def _replace(text: str, table: Mapping[str, str]) -> str:
    for old in sorted(table, key=len, reverse=True):
        text = text.replace(old, table[old])
    return text
