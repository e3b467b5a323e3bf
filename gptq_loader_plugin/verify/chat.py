"""Look at how messages become a prompt and where a reply ends: template, tokenizer, end tokens."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, cast

from gptq_loader_plugin.chat.find_template import find_template, known_tokens
from gptq_loader_plugin.chat.tokenizer import read_tokenizer
from gptq_loader_plugin.checkpoint.config import read_json
from gptq_loader_plugin.checkpoint.vocabulary import embedding_rows
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.verify.report import Diagnosis

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

    from gptq_loader_plugin.chat.template import Template
    from gptq_loader_plugin.checkpoint.protocol import Checkpoint
    from gptq_loader_plugin.load_options import LoadOptions
    from gptq_loader_plugin.plugins import Plugins

__all__ = ["diagnose_ends", "diagnose_template", "diagnose_tokenizer", "open_tokenizer"]

GENERATION = "generation_config.json"
FIRST, REPLY, SECOND = "gptqfirst", "gptqreply", "gptqsecond"  # words that no template has
BAR = "\uff5c"  # the wide one of DeepSeek's marks
MARK = re.compile(rf"<[|{BAR}][^<>\s|{BAR}]{{1,40}}[|{BAR}]>|<(?:start|end)_of_\w+>|\[/?INST\]")
# Marks of which a vocabulary has those that its model was trained on.
MARKS = (
    "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "[INST]", "<|user|>",
    "<|START_OF_TURN_TOKEN|>", f"<{BAR}User{BAR}>", "<|start|>", "<|User|>",
)  # fmt: skip
COPY = "copy the tokenizer's files of the model that this was made of"
# Rows without a token: of Phi-2 905 of 51,200; embeddings are padded to multiples of up to 1,024.
PADDED, PADDED_SHARE = 1024, 1.1
FEW_BEYOND = 64  # a padding token and such, which somebody added


def diagnose_tokenizer(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, *, few: bool
) -> Iterator[Diagnosis]:
    """Compare a tokenizer's tokens with the rows of the embedding, and with the configs' ids.

    Args:
        checkpoint: the open checkpoint.
        tokenizer: its tokenizer.
        few: whether a few tokens without a row count too: they matter where they are written.
    """
    rows = embedding_rows(checkpoint.headers)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if rows is None or not vocabulary:
        return
    beyond = sorted((index, token) for token, index in vocabulary.items() if index >= rows)
    if len(beyond) <= FEW_BEYOND:  # a class of transformers' may add one that no file has
        own = known_tokens(checkpoint.folder)
        beyond = [(index, token) for index, token in beyond if token in own]
    if len(beyond) > FEW_BEYOND or (beyond and few):
        of_other = len(beyond) > FEW_BEYOND
        kind = "the tokenizer is of another model" if of_other else "a token was added to it"
        yield Diagnosis(
            f"{kind}: {len(beyond)} of its tokens have no row in the embedding",
            f"{beyond[0][1]!r} is token {beyond[0][0]}, and the embedding has {rows} rows",
            COPY if of_other else "leave that token out of prompts, or " + COPY,
        )
    count = max(vocabulary.values()) + 1
    if rows > PADDED_SHARE * count + PADDED:
        yield Diagnosis(
            "the tokenizer is of another model: it has far fewer tokens than the embedding",
            f"{count} tokens, and the embedding has {rows} rows",
            COPY,
        )
    added: dict[str, int] = cast("Any", tokenizer).get_added_vocab()
    special = {*tokenizer.all_special_ids, *added.values()}
    ids, source = _end_ids(checkpoint)
    if ids and special and not special.intersection(ids):
        token = tokenizer.convert_ids_to_tokens(ids[0]) if ids[0] < count else None
        yield Diagnosis(
            "the end token's id is of another tokenizer: here it is an ordinary token, so a reply "
            "never stops, or stops anywhere",
            f"{source} has eos_token_id {ids[0]}, which is {token!r}",
            f"set eos_token_id to {tokenizer.eos_token_id} ({tokenizer.eos_token}), or {COPY}",
        )


def diagnose_template(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions,
    plugins: Plugins,
) -> Iterator[Diagnosis]:
    """Render a chat of known words, and see which of them, and which marks, come out."""
    template = _template(checkpoint, options, plugins)
    own = template.name not in ("none", "chatml")
    if not own:
        yield Diagnosis(
            "the checkpoint brings no chat template, and a program may use a wrong one",
            f"ours is {template.name}: {template.source}",
            "copy chat_template.jinja (or chat_template in tokenizer_config.json) of the model "
            "that this was made of, or name one: --template",
        )
        return
    turns = [("user", FIRST), ("assistant", REPLY), ("user", SECOND)]
    messages: Any = [{"role": role, "content": words} for role, words in turns]
    try:
        whole = template.render(messages)
        prompt = template.render(messages[:1])
        answered = template.render(messages[:2], add_generation_prompt=False)
    except GPTQLoaderError as error:
        yield Diagnosis(
            f"the chat template cannot be rendered: {error.message}", template.source, error.hint
        )
        return
    for words, what in ((FIRST, "the user's words"), (SECOND, "the user's second message"),
                        (REPLY, "earlier replies")):  # fmt: skip
        if words not in whole or (words == FIRST and words not in prompt):
            yield Diagnosis(
                f"the chat template leaves out {what}: the model never sees them",
                f"{template.source} makes {(prompt if words == FIRST else whole)[:120]!r} of a "
                f"chat with {words!r}",
                "copy the template of the model that this was made of, or name one: --template",
            )
            return
    header = answered.partition(FIRST)[2].partition(REPLY)[0].strip()
    tail = prompt.partition(FIRST)[2].strip()
    if header.startswith(tail) and header != tail:
        yield Diagnosis(
            "the chat template does not open the assistant's turn: the model goes on with the "
            "user's words, or writes both sides",
            f"{template.source} ends a prompt with {tail!r}; before a reply it writes {header!r}",
            "have it write the assistant's header where add_generation_prompt is set",
        )
    yield from _foreign_marks(template, whole, tokenizer)


def diagnose_ends(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    options: LoadOptions,
    plugins: Plugins,
) -> Iterator[Diagnosis]:
    """Compare what ends a turn in the template with what programs take for the end."""
    template = _template(checkpoint, options, plugins)
    for text in template.stop:
        pieces = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(pieces) != 1 and MARK.fullmatch(text):
            yield Diagnosis(
                f"{text} is no token: the model writes it in {len(pieces)} pieces, and programs "
                "that wait for one id go on",
                f"the tokenizer makes {pieces} of it; the template is {template.name}",
                f"{COPY}, or stop at the text {text!r}",
            )
    stop: Any = template.stop[0] if template.stop else None
    turn_end = tokenizer.get_vocab().get(stop) if stop else None
    if turn_end is None:
        turn_end, stop = tokenizer.eos_token_id, tokenizer.eos_token
    ids, source = _end_ids(checkpoint)
    if turn_end is None:
        yield Diagnosis(
            "nothing says where a reply ends: the tokenizer has no end token",
            "no eos_token in tokenizer_config.json",
            f"{COPY}, or set eos_token there and eos_token_id in {GENERATION}",
        )
    elif not ids:
        yield Diagnosis(
            "no config has an end token's id (eos_token_id), so programs never stop",
            f"neither {GENERATION} nor config.json; a turn ends with {stop} ({turn_end})",
            f"set eos_token_id to {turn_end} in {GENERATION}",
        )
    elif turn_end not in ids:
        token = [tokenizer.convert_ids_to_tokens(index) for index in ids if index < len(tokenizer)]
        yield Diagnosis(
            f"the end token's id is wrong: {source} ends a reply at {ids}, and a turn ends with "
            f"{stop} ({turn_end})",
            f"{ids} is {token}; the template is {template.name}: {template.source}",
            f"add {turn_end} to eos_token_id in {GENERATION}",
        )
    end = tokenizer.eos_token
    if end is None and ids:
        yield Diagnosis(
            "the tokenizer has no end token, and a program that takes its eos_token never stops",
            f"no eos_token in tokenizer_config.json; {source} has {ids}",
            f"set eos_token to {stop} in tokenizer_config.json",
        )
    elif template.stop and end not in template.stop and tokenizer.eos_token_id not in ids:
        yield Diagnosis(
            f"the tokenizer's end token is {end}, and a turn ends with {template.stop[0]}",
            f"tokenizer_config.json; the template is {template.name}",
            f"set eos_token to {template.stop[0]} in tokenizer_config.json, and eos_token_id to "
            f"{turn_end} in {GENERATION}",
        )
    if template.name not in ("none", "chatml") and not template.stop:
        yield Diagnosis(
            "the chat template writes nothing after a reply, so the model was not trained to end "
            "one by it, or it is another model's",
            f"{template.source}",
            f"copy the template of the model that this was made of; it should write {end}",
        )


def open_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | Diagnosis:
    """Read the tokenizer, or say why it cannot be read."""
    try:
        return read_tokenizer(checkpoint)
    except GPTQLoaderError as error:
        return Diagnosis(error.message, f"reading the tokenizer in {checkpoint.folder}", error.hint)


def _template(checkpoint: Checkpoint, options: LoadOptions, plugins: Plugins) -> Template:
    return find_template(
        checkpoint.folder,
        card=checkpoint.card,
        named=options.template,
        offered=plugins.templates(),
        rows=embedding_rows(checkpoint.headers),
    )


def _end_ids(checkpoint: Checkpoint) -> tuple[list[int], str]:
    """Return the ids at which transformers ends a reply, and which file has them."""
    for name in (GENERATION, "config.json"):
        file = checkpoint.folder / name
        table = read_json(file) if file.is_file() else {}
        text = table.get("text_config")
        for part in (table, text if isinstance(text, dict) else {}):
            value = part.get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            if ids := [it for it in values if isinstance(it, int)]:
                return ids, name
    return [], ""


def _foreign_marks(
    template: Template, text: str, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Diagnosis]:
    """Find marks of a template none of which the tokenizer has, where it has another model's."""
    vocabulary = tokenizer.get_vocab()
    marks = sorted(set(MARK.findall(text)))
    known = [mark for mark in MARKS if mark in vocabulary]
    if known and not any(mark in vocabulary for mark in marks):
        yield Diagnosis(
            "the chat template is of another model: none of its marks is a token here",
            f"{template.source} writes {', '.join(marks) or 'no marks'}; the vocabulary has "
            f"{', '.join(known)}",
            "copy the template of the model that this was made of, or name one: --template",
        )
