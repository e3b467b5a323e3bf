"""Make request bodies of an OpenAPI schema, most of them with something wrong."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random

__all__ = ["make_body", "wrong_text"]

# What clients send by mistake, or to see what happens.
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, 2**31, 2**63, 2**64, -(2**63), 10**400,
    float("nan"), float("inf"), "", " ", "x", "1", "null", "\x00", "\ud800", "\u202e", "a" * 5000,
    "<|im_end|>", "{{ 7*7 }}", "../../etc/passwd", "\U0001f600" * 50,
    [], [None], [[]], [[[[]]]], ["x"] * 200, {}, {"": None}, {"a": {"b": {"c": []}}},
)  # fmt: skip
DEEP = 8  # levels of a schema that refers to itself


def make_body(draw: random.Random, schema: dict[str, Any], route: dict[str, Any]) -> Any:  # noqa: ANN401
    """Make a body for a route: about as many right ones as wrong ones."""
    content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    return _Maker(draw, schema).make(content.get("schema", {}), 0)


def wrong_text(draw: random.Random) -> bytes:
    """Make bytes that are no request of anybody's."""
    whole = json.dumps({"messages": [{"role": "user", "content": "hello"}], "prompt": "x"})
    return draw.choice(
        (
            b"",
            b"null",
            b"[]",
            b'"text"',
            whole[: draw.randrange(len(whole))].encode(),
            whole.encode("utf-16"),
            b"\xff\xfe\x00" * 50,
            draw.randbytes(200),
            b"[" * 100_000,
            b'{"messages":' * 20_000,
            b'{"prompt": "\xed\xa0\x80"}',
            b'{"prompt": "x", "prompt": "y", "max_tokens": 1}',
            b'{"prompt": "x", "max_tokens": 1' + b"0" * 6000 + b"}",
            b'{"prompt": NaN}',
            b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}',
            b'{"prompt": "\\ud800", "max_tokens": 2}',
            b'{"text": "\\udc00"}',
        )
    )


class _Maker:
    """Values for schemas.

    Args:
        draw: chooses.
        whole: where references are looked up.
    """

    def __init__(self, draw: random.Random, whole: dict[str, Any]) -> None:
        self._draw = draw
        self._whole = whole

    def make(self, schema: dict[str, Any], depth: int) -> Any:  # noqa: ANN401, C901, PLR0911 - one for each kind
        draw = self._draw
        if draw.random() < 0.05 or depth > DEEP:
            return draw.choice(ODD)
        if "$ref" in schema:
            found: Any = self._whole
            for part in schema["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            return self.make(found, depth + 1)
        if choices := schema.get("anyOf") or schema.get("oneOf"):
            return self.make(draw.choice(choices), depth + 1)
        if "enum" in schema:
            return draw.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        match schema.get("type"):
            case "object":
                return self._object(schema, depth)
            case "array":
                count = draw.choice((0, 1, 1, 2, 3))
                return [self.make(schema.get("items", {}), depth + 1) for _ in range(count)]
            case "string":
                return draw.choice(("hello", "", "a b c", "\u00e9\u4e2d", "\n", "user", "[1,2]"))
            case "boolean":
                return draw.random() < 0.5
            case "null":
                return None
            case "integer" | "number" as kind:
                return self._number(schema, whole=kind == "integer")
        return draw.choice(ODD)

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        draw = self._draw
        needed = set(schema.get("required", ()))
        made = {
            name: self.make(its, depth + 1)
            for name, its in schema.get("properties", {}).items()
            if (name in needed and draw.random() < 0.95) or draw.random() < 0.15
        }
        extra = schema.get("additionalProperties")
        if isinstance(extra, dict) or draw.random() < 0.05:
            made[draw.choice(("x", "5", "", "type", "cache_prompt", "typical_p"))] = self.make(
                extra if isinstance(extra, dict) else {}, depth + 1
            )
        return made

    def _number(self, schema: dict[str, Any], *, whole: bool) -> float:
        least = schema.get("minimum", schema.get("exclusiveMinimum", -1000))
        most = schema.get("maximum", schema.get("exclusiveMaximum", 1000))
        edges = (least, most, least - 1, most + 1, 0, 1, self._draw.uniform(least, min(most, 30)))
        value = self._draw.choice(edges)
        return int(value) if whole else float(value)
