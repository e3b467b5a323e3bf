"""Replies of a form: schemas as clients write them, patterns, choices, grammars, on each route."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from altered import DATA, ONE
from served import CHAT, COMPLETE, Running, running
from transformers import AutoTokenizer

from gptq_loader_extensions.openai.errors import ApiError
from gptq_loader_extensions.openai.replies.structured import write_grammar
from gptq_loader_extensions.openai.schema.constraints import Constraint
from gptq_loader_extensions.openai.schema.json_schema import FORMATS, prepare_schema

if TYPE_CHECKING:
    from collections.abc import Iterator

llguidance = pytest.importorskip("llguidance")
hf = pytest.importorskip("llguidance.hf")
OPEN = {"type": "object", "properties": {"c": {"enum": ["red", "green"]}}, "required": ["c"]}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("served"), names=(ONE,)) as it:
        yield it


def said(served: Running, **body: Any) -> str:
    answer = served.chat(max_tokens=60, seed=1, **body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert choice["finish_reason"] == "stop"
    content: str = choice["message"]["content"]
    return content


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": OPEN}}},
        {"response_format": {"type": "json_schema", "schema": OPEN}},
        {"response_format": {"type": "json_object", "schema": OPEN}},
        {"structured_outputs": {"json": OPEN}},
        {"guided_json": OPEN},
        {"guided_json": json.dumps(OPEN)},
        {"json_schema": OPEN},
    ],
)
def test_a_schema_is_followed_under_each_of_its_names(
    served: Running, fields: dict[str, Any]
) -> None:
    """And its reply ends, though the schema lets an object have more, and whitespace."""
    content = said(served, **fields)
    assert content in ('{"c": "red"}', '{"c": "green"}')


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[0-9]{3}"}}, "[0-9]{3}"),
        ({"guided_regex": "a/[bc]"}, "a/[bc]"),
        ({"regex": "yes|no"}, "yes|no"),
        ({"structured_outputs": {"choice": ["yes", "n\n\u00f6"]}}, "yes|n\n\u00f6"),
        ({"guided_choice": ["yes"]}, "yes"),
        ({"grammar": 'root ::= "x" [0-9] | "yy"'}, "x[0-9]|yy"),
        ({"grammar_string": 'start: "x" /[0-9]/'}, "x[0-9]"),
        ({"ebnf": 'root ::= "z"'}, "z"),
    ],
)
def test_patterns_choices_and_grammars_are_kept_to(
    served: Running, fields: dict[str, Any], pattern: str
) -> None:
    assert re.fullmatch(pattern, said(served, **fields))
    body = {"prompt": "Hello", "max_tokens": 20, "seed": 2, **fields}
    text = served.post(COMPLETE, **body).json()["choices"][0]["text"]
    assert re.fullmatch(pattern, text)
    body["max_length"] = body.pop("max_tokens")
    text = served.post("/api/v1/generate", **body).json()["results"][0]["text"]
    assert re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[1]"}, "guided_json"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": ["a"], "guided_regex": "b"}, "guided_"),
        ({"response_format": {"type": "json_object", "shema": {}}}, "response_format.shema"),
        ({"structured_outputs": {"jsn": {}}}, "structured_outputs.jsn"),
        ({"structured_outputs": {"whitespace_pattern": "x"}}, "structured_outputs.whitespace"),
        ({"response_format": {"type": "text", "schema": OPEN}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format"),
        ({"grammar": "x" * 300_000}, "grammar"),
    ],
)
def test_a_form_that_cannot_be_kept_to_is_refused(
    served: Running, fields: dict[str, Any], param: str
) -> None:
    answer = served.chat(**fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_choice": None},
        {"guided_json": {}},
        {"grammar": ""},
        {"structured_outputs": None},
        {"structured_outputs": {}},
        {"structured_outputs": {"json": None, "whitespace_pattern": None, "structural_tag": None}},
        {"response_format": {"type": "text"}},
        {"json_schema": {}},
    ],
)
def test_an_empty_form_is_none(served: Running, fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "temperature": 0}
    plain = served.post(CHAT, **body).json()["choices"]
    assert served.post(CHAT, **body, **fields).json()["choices"] == plain


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        ({"type": "string", "enum": ["x", "y"]}, r"\{(\"[xy]\": (true|false)(, )?)*\}"),
        ({"const": "x"}, r"\{(\"x\": (true|false))?\}"),
        ({"pattern": "^[ab]$"}, r"\{(\"[ab]\": (true|false)(, )?)*\}"),
        (
            {"type": "string", "minLength": 1, "maxLength": 2},
            r"\{(\".{1,2}\": (true|false)(, )?)*\}",
        ),
    ],
)
def test_the_names_of_a_record_are_kept_to(
    served: Running, names: dict[str, Any], pattern: str
) -> None:
    """As Zod writes z.record() of an enumeration; what is cut off is none of its names' fault."""
    schema = {
        "type": "object",
        "propertyNames": names,
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 2,
    }
    prepared = prepare_schema(schema)
    assert "propertyNames" not in prepared
    assert prepared["additionalProperties"] is False
    del schema["maxProperties"]  # which llguidance does not count beside properties
    form = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {**schema, "required": []}},
    }
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "seed": 3}
    choice = served.post(CHAT, **body, response_format=form).json()["choices"][0]
    text = choice["message"]["content"]
    if choice["finish_reason"] == "stop":
        assert re.fullmatch(pattern, text), text
    else:
        assert text.startswith("{"), text


def test_what_is_not_evaluated_is_not_written() -> None:
    schema = {"type": "object", "properties": {"a": {}}, "unevaluatedProperties": False}
    assert prepare_schema(schema) == {
        "type": "object",
        "properties": {"a": {}},
        "additionalProperties": False,
    }
    several = {"allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False}
    assert prepare_schema(several)["unevaluatedProperties"] is False


def test_a_keyword_that_cannot_be_enforced_is_named_in_one_line(served: Running) -> None:
    schema = {"type": "array", "items": {}, "uniqueItems": True}
    answer = served.chat(guided_json=schema)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert message.startswith('the schema has "uniqueItems", which cannot be enforced here')
    assert "\n" not in message


def test_annotations_are_left_out() -> None:
    schema = {
        "type": "object",
        "properties": {
            "format": {"type": "string", "format": "path"},
            "when": {"type": "string", "format": "date"},
            "prices": {"propertyNames": {"type": "string"}, "additionalProperties": False},
        },
        "default": {"format": "path"},
    }
    prepared = prepare_schema(schema)
    assert prepared["properties"] == {
        "format": {"type": "string"},
        "when": {"type": "string", "format": "date"},
        "prices": {"additionalProperties": False},
    }
    assert prepared["default"] == {"format": "path"}, "a value is no schema"
    kept = {"type": "object", "propertyNames": {"not": {"const": "a"}}}
    assert prepare_schema(kept) == kept, "which says something, and is refused by name"


def test_every_format_that_is_kept_is_followed() -> None:
    for name in sorted(FORMATS):
        grammar = write_grammar(Constraint("schema", {"type": "string", "format": name}, "x"))
        matcher = llguidance.LLMatcher
        assert matcher.validate_grammar(matcher.grammar_from_lark(grammar)) == "", name


def takes(schema: Any, text: str, *, closed: bool = True) -> bool:
    """Whether a schema, as it is followed, takes a text."""
    known = hf.from_tokenizer(AutoTokenizer.from_pretrained(DATA / ONE), eos_token=[2])
    grammar = write_grammar(Constraint("schema", schema, "x", closed=closed))
    matcher = llguidance.LLMatcher(known, llguidance.LLMatcher.grammar_from_lark(grammar))
    tokens = known.tokenize_str(text)
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


A, B = ({"type": "object", "properties": {name: {"type": "integer"}}} for name in "ab")


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (A, '{"a": 1}', '{"a": 1, "z": 1}'),
        (A, "{}", '{"a":  1}'),
        ({**A, "additionalProperties": True}, '{"a": 1, "z": 1}', '{"a": "x"}'),
        ({"allOf": [A, B]}, '{"a": 1, "b": 2}', '{"a": "x"}'),
        ({"$defs": {"A": A}, "$ref": "#/$defs/A"}, '{"a": 1}', '{"z": 1}'),
        ({"$defs": {"A": A}, "allOf": [{"$ref": "#/$defs/A"}, B]}, '{"a": 1, "b": 2}', "[]"),
        ({"anyOf": [A, B]}, '{"b": 1}', '{"z": 1}'),
        ({**A, "anyOf": [B, {"type": "object"}]}, '{"a": 1, "b": 1}', '{"a": "x"}'),
        ({"type": "array", "items": A}, '[{"a": 1}]', '[{"z": 1}]'),
        (True, '{"any": [1]}', "{"),
    ],
)
def test_an_object_has_what_it_lists_and_nothing_else(schema: Any, right: str, wrong: str) -> None:
    assert takes(schema, right)
    assert not takes(schema, wrong)


def test_a_schema_that_is_not_strict_stays_open() -> None:
    assert takes(A, '{"a": 1, "z": 1}', closed=False)


def test_two_forms_at_once_are_refused() -> None:
    with pytest.raises(ApiError, match="characters"):
        write_grammar(Constraint("schema", {"enum": ["x" * 300_000]}, "x"))
