"""Measure by turns: load a model, then answer a line of stdin with a line of JSON on stdout.

The lines are `prompt N` and `reply N`, each answered with seconds. Every worker shares this, in
whichever environment it runs: the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable

DEPTH = int(os.environ.get("BENCH_DEPTH", "16"))  # tokens of the prompt before a measured reply
CONTEXT = int(os.environ.get("BENCH_CONTEXT", "1024"))  # positions for which there is room
TOKENS = 30_000  # of a vocabulary, which a longer prompt begins again


class Loaded(NamedTuple):
    """A loaded model, as it is measured.

    `prompt` and `reply` take a number of tokens and give seconds: of reading a prompt up to the
    logits after it, and of writing a greedy reply after a prompt of DEPTH tokens, its first token
    left out. `facts` are what a reader of the figures must know.
    """

    prompt: Callable[[int], float]
    reply: Callable[[int], float]
    facts: dict[str, Any]


def serve(load: Callable[[str], Loaded]) -> None:
    """Load what the first argument names, and answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    began = time.perf_counter()
    loaded = load(sys.argv[1])
    answer(answers, {"load_seconds": time.perf_counter() - began, **loaded.facts})
    for line in sys.stdin:
        what, count = line.split()
        seconds = (loaded.prompt if what == "prompt" else loaded.reply)(int(count))
        answer(answers, {"seconds": seconds})


def answer(answers: TextIO, content: dict[str, Any]) -> None:
    """Write a line."""
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def token_ids(count: int) -> list[int]:
    """Give a prompt of so many tokens, none of them special."""
    return [300 + i % TOKENS for i in range(count)]
