"""Read the calls in a text that holds nothing else: JSON as any model writes it, or tags.

GLM 4.5 writes NAME, then <arg_key>K</arg_key><arg_value>V</arg_value>; Qwen3-Coder
<function=NAME><parameter=K>V</parameter></function>.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.schema.json_text import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["BETWEEN", "parse_calls"]

ARGUMENTS = ("arguments", "parameters", "args", "input", "params", "kwargs", "argument")
# What else a call may have beside its name; all other keys are arguments that stand by themselves.
OF_CALLS = frozenset({"name", "function", "type", "id", "index", *ARGUMENTS})
FENCE = re.compile(r"```\w*\s*(.*?)\s*(?:```)?", re.DOTALL)
GLM = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
CODER = re.compile(r"<function=([^>]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?(?:</parameter>|\Z)", re.DOTALL)
BETWEEN = re.compile(r"[\s;,]*")
MAX_NESTED = 200  # as deep as JSON may nest


def parse_calls(text: str) -> Iterator[tuple[str, str]]:
    """Yield the calls in what stands where calls do: their names, and their arguments as JSON.

    A fence of Markdown around them is passed over; a text that is no call gives none.
    """
    stripped = text.strip()
    if fence := FENCE.fullmatch(stripped):
        stripped = fence[1]
    if stripped.startswith("<function="):
        for match in CODER.finditer(stripped):
            pairs = PARAMETER.findall(match[2])
            yield match[1].strip(), _to_json({key.strip(): _value(value) for key, value in pairs})
        return
    if not stripped.startswith(("{", "[")):
        name = stripped.partition("<arg_key>")[0].strip()
        if GLM.search(stripped) and name.isprintable():
            pairs = GLM.findall(stripped)
            yield name, _to_json({key.strip(): _value(value.strip()) for key, value in pairs})
        return
    for content in _parse_several(stripped):
        calls = content if isinstance(content, list) else [content]
        for call in calls:
            if parsed := _parse_call(call):
                yield parsed


def _parse_several(text: str) -> Iterator[Any]:
    """Yield values of JSON that stand one after another; what follows them is left out."""
    with contextlib.suppress(ValueError):
        yield parse_json(text)
        return
    if text.count("{") + text.count("[") > MAX_NESTED:
        return
    decoder = json.JSONDecoder(strict=False)  # line feeds in strings, as small models write them
    at = 0
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return
        yield value
        match = BETWEEN.match(text, at)
        at = at if match is None else match.end()


def _parse_call(content: object) -> tuple[str, str] | None:
    """Return a call as a name and arguments of JSON; None where it is none."""
    if not isinstance(content, dict):
        return None
    inner = content.get("function")
    if isinstance(inner, dict):  # as OpenAI's API has it
        return _parse_call(inner)
    name = content.get("name", inner)
    if not isinstance(name, str) or not name:
        return None
    beside = {key: value for key, value in content.items() if key not in OF_CALLS}
    arguments: Any = next(
        (content[key] for key in ARGUMENTS if content.get(key) is not None), beside
    )
    if isinstance(arguments, str):
        try:
            is_object = isinstance(parse_json(arguments), dict)
        except ValueError:
            is_object = False
        return name, arguments if is_object else _to_json(arguments)
    return name, _to_json(arguments)


def _to_json(value: object) -> str:
    """Write JSON; what it has no form for, an infinite number, is written as null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False)


def _finite(value: Any) -> Any:  # noqa: ANN401 - JSON
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _value(text: str) -> object:
    """Return what a tag holds: JSON where it is some, else a text."""
    try:
        return parse_json(text)
    except ValueError:
        return text
