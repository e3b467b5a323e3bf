"""Parse JSON that strangers wrote, within limits of how deep it nests and how much there is of it.

A parser holds Python's lock to its end, and with it every reply that is being generated: 4 MB of
empty lists take it half a second. Numbers are cheap, so that only what else there is counts.
"""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json

__all__ = ["MAX_VALUES", "parse_body", "parse_json"]

MAX_VALUES = 200_000  # strings, lists and objects of a body: 0.1 s at most
MARKS = b'"[{'
OTHERS = bytes(byte for byte in range(256) if byte not in MARKS)


def parse_json(text: str | bytes) -> Any:  # noqa: ANN401 - any JSON
    """Parse JSON that nests no deeper than 200 levels, which all that reads it later can follow.

    Raises:
        ValueError: it is no JSON, is nested deeper, or has half a character.
    """
    return from_json(text, cache_strings="keys")


def parse_body(body: bytes) -> Any:  # noqa: ANN401 - any JSON
    """Parse the body of a request.

    Raises:
        ValueError: as `parse_json`, or there is too much in it; the message says so.
    """
    if _too_many(body):
        raise ValueError(f"the body has more than {MAX_VALUES:,} strings, lists and objects")
    try:
        return parse_json(body)
    except ValueError as error:
        if "recursion" in str(error):
            raise ValueError("the body is nested too deeply") from error
        raise ValueError("the body is not JSON") from error


def _too_many(body: bytes) -> bool:
    """Return whether there are more strings, lists and objects than allowed."""
    if len(body) < MAX_VALUES:
        return False
    marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, OTHERS)
    strings = marks.count(b'"') // 2
    if strings > MAX_VALUES:
        return True
    if len(marks) - strings <= MAX_VALUES:
        return False
    outside = marks.split(b'"')[::2]
    return strings + sum(map(len, outside)) > MAX_VALUES
