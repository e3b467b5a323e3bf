"""Tokenise a template's prompt so that no content of a message becomes a control token."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.chat.messages import check_messages
from gptq_loader_plugin.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin.chat.messages import Message
    from gptq_loader_plugin.chat.template import Template

__all__ = ["control_tokens", "encode_messages"]

# Added tokens that no tokenizer file marks as special and that still rule a conversation:
# <|im_end|> of 2023's added_tokens.json, DeepSeek's with full-width bars, [INST]. <think> and
# <tool_call> are content: templates look for them in what an assistant said.
CONTROL_SHAPE = re.compile(r"<[|\uff5c].*[|\uff5c]>|\[/?[A-Z_]+\]|</?s>", re.DOTALL)
PRIVATE_USE = range(0xE000, 0xF8FF)
WORD = re.compile(r"\w{1,50}")
PROBE = "gptqquestion"
ANCHOR = "\ue002"  # no vocabulary merges it with its neighbours


def encode_messages(
    template: Template,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = True,
    add_bos: bool = True,
) -> list[int]:
    """Tokenise a template's prompt so that no content becomes a control token.

    What a `Template.encode` is made of: the template's own control tokens are tokens, and what a
    user typed is text, even where it spells one.

    Where no message spells a control token, the prompt is tokenised in one go, as training code
    does. Where one does, what it spells is rendered as a stand-in, the prompt is cut at the
    template's own control tokens, and the text between is tokenised as nothing but text.

    Args:
        template: renders the messages.
        messages: with contents as users typed them.
        tokenizer: the checkpoint's.
        add_generation_prompt: whether to end with the assistant's header.
        add_bos: whether to put the tokenizer's beginning-of-text token first where it does so by
            itself and the prompt does not have it.

    Returns:
        The prompt's token ids.

    Raises:
        TemplateError: the template does not take these messages, or leaves out what the user says.
    """
    checked = check_messages(messages)
    controls = control_tokens(tokenizer)
    start = _beginning(tokenizer) if add_bos else []
    contents = "\0".join(text for message in checked for text in _texts(message))
    spelled = [token for token in controls if token in contents]
    if not spelled:
        text = template.render(checked, add_generation_prompt=add_generation_prompt)
        _check_words(template, checked, text)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return _joined(start, ids)
    mark = _unused_mark(contents)
    stand_ins = {token: f"{mark}{i}{mark}" for i, token in enumerate(spelled)}
    disguised = [{**_replaced(message, stand_ins), "role": message["role"]} for message in checked]
    text = template.render(disguised, add_generation_prompt=add_generation_prompt)
    _check_words(template, disguised, text)
    restored = {stand_in: token for token, stand_in in stand_ins.items()}
    ids = []
    end = 0
    for match in _any_of(controls).finditer(text):
        before = _replace(text[end : match.start()], restored)
        ids += _plain(before, tokenizer, controls, after_control=end > 0)
        ids.append(controls[match[0]])
        end = match.end()
    ids += _plain(_replace(text[end:], restored), tokenizer, controls, after_control=end > 0)
    return _joined(start, ids)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Find the tokens that text can spell and that rule a conversation, with their ids."""
    controls = {
        token.content: index
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or CONTROL_SHAPE.fullmatch(token.content)
    }
    for token in tokenizer.all_special_tokens:
        index: Any = tokenizer.convert_tokens_to_ids(token)
        if token and index is not None:
            controls.setdefault(str(token), int(index))
    return controls


def _check_words(template: Template, messages: Sequence[dict[str, Any]], rendered: str) -> None:
    """Refuse a prompt that is the same whatever the user says.

    Raises:
        TemplateError: what the last user message says is not in it.
    """
    last = next((i for i, it in reversed([*enumerate(messages)]) if it["role"] == "user"), None)
    words = [] if last is None else WORD.findall(messages[last]["content"])
    if last is None or not words or max(words, key=len) in rendered:
        return
    probed = list(messages)
    probed[last] = {
        **probed[last],
        "content": PROBE,
    }  # a template may change how words are written
    if PROBE in template.render(probed):
        return
    raise TemplateError(
        f"the chat template of {template.source} leaves out what the user says",
        hint='choose another template: template="chatml"',
    )


def _unused_mark(contents: str) -> str:
    """Return characters that the contents do not have: one of private use, or more than there are.

    A run of a character, longer than any in the contents, serves where every one of them is used.
    """
    used = set(contents)
    unused = next((chr(code) for code in PRIVATE_USE if chr(code) not in used), None)
    if unused is not None:
        return unused
    first = chr(PRIVATE_USE.start)
    return first * (max(map(len, re.findall(f"{first}+", contents))) + 1)


def _plain(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    controls: Mapping[str, int],
    *,
    after_control: bool,
) -> list[int]:
    """Tokenise text as nothing but text, as the middle of a prompt is."""
    anchor = _anchor(tokenizer, controls) if after_control else ""
    ids = _split(text, tokenizer, anchor)
    cuts = [match.start() + 1 for match in _any_of(controls).finditer(text)]
    if not cuts or not set(ids) & set(controls.values()):
        return ids
    # An added token that is not special is found whatever split_special_tokens says: cut it.
    ids = _split(text[: cuts[0]], tokenizer, anchor)
    for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
        ids += _split(text[begin:end], tokenizer, ANCHOR)
    return ids


def _split(text: str, tokenizer: PreTrainedTokenizerBase, anchor: str) -> list[int]:
    if not text:
        return []

    def ids(of: str) -> list[int]:
        token_ids: list[int] = tokenizer(of, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return token_ids

    return ids(anchor + text)[len(ids(anchor)) :] if anchor else ids(text)


def _anchor(tokenizer: PreTrainedTokenizerBase, controls: Mapping[str, int]) -> str:
    """Return what to write before a text so that it is tokenised as it is after a control token.

    SentencePiece tokenizers of transformers 5 put a space before the first word of a prompt alone:
    "a" is `▁a` on its own and `a` after a control token.
    """
    control = next(iter(controls))
    alone = tokenizer("a", add_special_tokens=False)["input_ids"]
    after = tokenizer(control + "a", add_special_tokens=False)["input_ids"][1:]
    return "" if alone == after else ANCHOR


def _any_of(controls: Mapping[str, int]) -> re.Pattern[str]:
    return re.compile(
        "|".join(re.escape(control) for control in sorted(controls, key=len, reverse=True))
    )


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _joined(start: list[int], ids: list[int]) -> list[int]:
    return ids if ids[: len(start)] == start else start + ids


def _texts(value: object) -> list[str]:
    """List every text in a message, whatever it is nested in."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (*_texts(key), *_texts(item))]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return []


def _replaced(value: Any, table: Mapping[str, str]) -> Any:  # noqa: ANN401 - a message is JSON
    if isinstance(value, str):
        return _replace(value, table)
    if isinstance(value, dict):
        return {_replaced(key, table): _replaced(item, table) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, table) for item in value]
    return value


def _replace(text: str, table: Mapping[str, str]) -> str:
    for old in sorted(table, key=len, reverse=True):
        text = text.replace(old, table[old])
    return text
