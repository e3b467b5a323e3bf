"""Match modules' names with the patterns of a config, which anyone may have written."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Overrides", "expression", "pattern_fault"]

WILDCARDS = 1000  # patterns that are no plain names
REPEATS = 5  # of any length, in one pattern: each multiplies the time of a match
SECONDS = 2.0  # for all matches together
PLAIN = re.compile(r"(?:[\w/ -]|\\\W)*\$")
ESCAPED = re.compile(r"\\.|\[[^\]]*\]", re.DOTALL)


class Overrides:
    """The settings that patterns give modules; the first pattern that matches counts.

    Args:
        dynamic: settings by pattern, as GPTQModel writes them.
    """

    def __init__(self, dynamic: Mapping[str, Any]) -> None:
        self._names: dict[str, tuple[int, str]] = {}
        self._patterns: list[tuple[int, re.Pattern[str], str]] = []
        for i, pattern in enumerate(dynamic):
            written = expression(pattern)
            if PLAIN.fullmatch(written):
                name = re.sub(r"\\(\W)", r"\1", written[:-1])
                self._names.setdefault(name, (i, pattern))
            else:
                self._patterns.append((i, re.compile(written), pattern))
        self._left = SECONDS

    def find(self, module: str) -> str | None:
        """Return the first pattern that matches a module's name from its start.

        Raises:
            TimeoutError: the patterns take too long.
        """
        place, named = self._names.get(module, (len(self._names) + len(self._patterns), None))
        began = time.monotonic()
        try:
            for i, compiled, pattern in self._patterns:
                if i > place:
                    break
                if compiled.match(module):
                    return pattern
                if time.monotonic() - began > self._left:
                    raise TimeoutError(f"{pattern!r} and the others take too long to match")
        finally:
            self._left -= time.monotonic() - began
        return named


def expression(pattern: str) -> str:
    """Return a key of `dynamic` without the mark before it."""
    return pattern[2:] if pattern.startswith(("-:", "+:")) else pattern


def pattern_fault(dynamic: Mapping[str, Any]) -> str | None:
    """Say what is wrong with patterns that cannot be matched, or not in any bearable time."""
    wild = [key for key in dynamic if not PLAIN.fullmatch(expression(key))]
    if len(wild) > WILDCARDS:
        return f"{len(wild):,} patterns, and no more than {WILDCARDS:,} are matched"
    for pattern in wild:
        try:
            re.compile(expression(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            return f"{pattern[:100]!r}, which is no regular expression ({error})"
        plain = ESCAPED.sub("x", expression(pattern)).replace("(?", "(")
        if re.search(r"\)[*+{]", plain) or len(re.findall(r"[*+{]", plain)) > REPEATS:
            return f"{pattern[:100]!r}, which may take for ever to match"
    return None
