"""What every error says, and that all of it keeps to the same rules."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import pytest
from altered import golden
from error_messages import VALUE, Module, collect, own_names, subclasses

if TYPE_CHECKING:
    from error_messages import ErrorText

# Names that are ours by chance: users type them for transformers.
THEIRS = {"from_pretrained"}


@pytest.fixture(scope="module")
def texts() -> list[ErrorText]:
    return collect()


def test_no_message_changes_unseen(texts: list[ErrorText]) -> None:
    """A diff of tests/golden/messages.txt shows a reviewer each one."""
    golden("messages.txt", "".join(f"{text.text()}\n" for text in texts))


def test_every_error_says_what_is_wrong_and_what_to_do(texts: list[ErrorText]) -> None:
    empty = [text for text in texts if not all(it.strip() for it in (*text.messages, *text.hints))]
    assert not empty


def test_a_hint_begins_with_what_to_do(texts: list[ErrorText]) -> None:
    """In lower case: it stands behind "hint: "."""
    hints = [hint for text in texts for hint in text.hints]
    assert [hint for hint in hints if not re.match(r"[a-z]|{…}", hint)] == []


def test_nothing_ends_with_a_full_stop(texts: list[ErrorText]) -> None:
    ended = [
        words
        for text in texts
        for words in (*text.messages, *text.hints)
        if words.endswith(".") and not words.endswith("...")
    ]
    assert ended == []


def test_no_function_of_ours_is_named(texts: list[ErrorText]) -> None:
    """But for what users type: an option (`name=`, `--name`), or what stands in backticks."""
    internal = own_names() - THEIRS
    named = [
        words
        for text in texts
        for words in (*text.messages, *text.hints)
        if internal & set(re.findall(r"(?<![\w`-])\w+(?![\w`=])", words))
    ]
    assert named == []


SOURCE = """
AGAIN = "run it again"

class Wrong(GPTQLoaderError):
    pass

def check(value, hint):
    which = "first" if value else "second"
    raise Wrong(f"the {which} of {value} is wrong", hint=hint)

def run(value):
    check(value, "leave it out")
    check(value, hint=f"{AGAIN}, or wait")

def next_step(value):
    if value:
        return "go on"
    return AGAIN

def end(value):
    error = GPTQLoaderError("it has " + "ended", hint=next_step(value))
    raise error

def hand_on(error):
    raise Wrong(str(error), hint=error.hint)
"""


def test_words_are_found_where_they_come_from() -> None:
    module = Module(ast.parse(SOURCE))
    names = subclasses([module.tree])
    assert names == {"GPTQLoaderError", "Wrong"}
    ended, wrong = sorted(module.errors(names, {}))
    assert ended.text().splitlines() == [
        "GPTQLoaderError: it has ended",
        "  hint: go on",
        "  hint: run it again",
    ]
    assert wrong.messages == (f"the {VALUE} of {VALUE} is wrong",)
    assert wrong.hints == ("leave it out", "run it again, or wait")
