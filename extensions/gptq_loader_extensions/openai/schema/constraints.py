"""The ways in which clients ask for a reply of a certain form, as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.schema.json_text import parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Constraint", "ResponseFormat", "Structured", "read_constraint"]

Schema = dict[str, Any] | bool
Pattern = Annotated[str, Field(max_length=1 << 18)]
Choices = Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=1000)]


@dataclass(frozen=True, slots=True)
class Constraint:
    """The form that a reply must have.

    Attributes:
        kind: what describes it.
        value: a JSON schema, a regular expression, texts of which it is one, or a grammar of
            GBNF or Lark.
        param: the field of the request that has it.
        closed: whether a schema's objects have no properties but those they list.
    """

    kind: Literal["schema", "regex", "choice", "grammar"]
    value: Any
    param: str
    closed: bool = True


class JsonSchema(BaseModel):
    """A schema that a reply must follow."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    content: Schema | None = Field(default=None, alias="schema")


class ResponseFormat(BaseModel):
    """The form of a reply, as OpenAI's API has it, or with the schema beside the type."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    content: Schema | None = Field(default=None, alias="schema")

    def constraint(self) -> Constraint | None:
        """Return the form; None where any text will do.

        Raises:
            ApiError: the schema is missing, or would have no effect.
        """
        param = "response_format"
        inner = self.json_schema
        if self.type == "text" and (inner is not None or self.content is not None):
            raise invalid(
                "response_format has a schema, which the type text does not follow; send the type "
                "json_schema",
                param=param,
            )
        if self.type == "text":
            return None
        schema = inner.content if inner is not None else None
        closed = inner is None or inner.strict is not False
        if schema is None:
            schema = self.content
        if schema is None and self.type == "json_schema":
            raise invalid(
                "response_format json_schema needs a schema: json_schema.schema", param=param
            )
        return Constraint("schema", {"type": "object"} if schema is None else schema, param, closed)


class StructuredOutputs(BaseModel):
    """The form of a reply, as vLLM has it."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    schema_: Schema | str | None = Field(default=None, alias="json")
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None
    json_object: bool | None = None
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: Literal[""] | None = None
    structural_tag: Literal[""] | None = None


class Structured(BaseModel):
    """The options that ask for a form, under all the names there are."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None  # vLLM
    guided_json: Schema | str | None = None  # vLLM before 0.12
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    guided_grammar: Pattern | None = None
    json_schema: Schema | str | None = None  # llama.cpp
    grammar: Pattern | None = None  # llama.cpp, KoboldCpp
    grammar_string: Pattern | None = None  # text-generation-webui
    regex: Pattern | None = None  # SGLang
    ebnf: Pattern | None = None


def read_constraint(request: Structured) -> Constraint | None:
    """Return the form that a request asks for; None where it asks for none.

    Raises:
        ApiError: it asks for several, or for a schema that is none.
    """
    constraints = list(_constraints(request))
    if len(constraints) > 1:
        first, second = constraints[0].param, constraints[1].param
        raise invalid(
            f"{first} and {second} both say what form the reply has; send one", param=second
        )
    return constraints[0] if constraints else None


def _constraints(request: Structured) -> Iterator[Constraint]:
    if request.response_format is not None:
        constraint = request.response_format.constraint()
        if constraint is not None:
            yield constraint
    structured = request.structured_outputs
    if structured is not None:
        if structured.json_object:
            yield Constraint("schema", {"type": "object"}, "structured_outputs.json_object")
        yield from _some("schema", structured.schema_, "structured_outputs.json")
        yield from _some("regex", structured.regex, "structured_outputs.regex")
        yield from _some("choice", structured.choice, "structured_outputs.choice")
        yield from _some("grammar", structured.grammar, "structured_outputs.grammar")
    for name in ("guided_json", "json_schema"):
        yield from _some("schema", getattr(request, name), name)
    for name in ("guided_regex", "regex"):
        yield from _some("regex", getattr(request, name), name)
    yield from _some("choice", request.guided_choice, "guided_choice")
    for name in ("guided_grammar", "grammar", "grammar_string", "ebnf"):
        yield from _some("grammar", getattr(request, name), name)


def _some(
    kind: Literal["schema", "regex", "choice", "grammar"],
    value: Any,  # noqa: ANN401 - of the kind
    param: str,
) -> Iterator[Constraint]:
    """Yield a form, unless it is empty, which clients send to ask for none."""
    if value in (None, "", [], {}):
        return
    if kind == "schema" and isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            raise invalid(f"{param} is not JSON; send a JSON schema", param=param) from error
        if not isinstance(value, dict | bool):
            raise invalid(f"{param} is not a JSON schema; send an object", param=param)
    yield Constraint(kind, value, param)
