"""Prepare a JSON schema to be followed while a reply is generated.

What says nothing of a text is left out, as JSON Schema has it for annotations; an object has no
other properties than those it lists, unless the schema says that it may: a small model goes on
inventing them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["prepare_schema"]

# Those that llguidance follows; any other is an annotation.
FORMATS = frozenset(
    {
        "date",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "time",
        "uri",
        "uuid",
    }
)
ANY_NAME: tuple[object, ...] = (True, {}, {"type": "string"})  # every name in JSON is a string
BY_NAME = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})
BRANCHES = frozenset({"allOf", "anyOf", "oneOf"})
LISTS = frozenset({"items", "prefixItems"})
SINGLE = frozenset(
    {
        "additionalItems",
        "additionalProperties",
        "contains",
        "else",
        "if",
        "items",
        "not",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
# An object with one of these is described in several places, or says itself what else it may have.
OPEN = frozenset(
    {
        "$ref",
        "additionalProperties",
        "allOf",
        "anyOf",
        "if",
        "oneOf",
        "patternProperties",
        "unevaluatedProperties",
    }
)


def prepare_schema(schema: Any, *, closed: bool = True) -> Any:  # noqa: ANN401 - an object or a boolean
    """Return a schema as it is to be followed.

    Args:
        schema: as the client sent it.
        closed: whether objects have the properties they list and no others, unless they say so.
    """
    shared = frozenset(_parts_of_objects(schema, part=False)) if closed else frozenset()
    return _prepare(schema, closed=closed, path="#", shared=shared)


def _prepare(schema: Any, *, closed: bool, path: str, shared: frozenset[str]) -> Any:  # noqa: ANN401
    if not isinstance(schema, dict):
        return schema
    schema = _with_names(_evaluated(schema))
    closed_here = closed and path not in shared
    # What stands beside branches describes the same object as they do.
    beside = bool(OPEN & set(schema)) and "properties" in schema
    prepared: dict[str, Any] = {}
    for name, value in schema.items():
        if name == "format" and value not in FORMATS:
            continue
        if name == "propertyNames" and value in ANY_NAME:
            continue
        here = f"{path}/{name}"
        if name in BY_NAME and isinstance(value, dict):
            prepared[name] = {
                key: _prepare(item, closed=closed, path=f"{here}/{key}", shared=shared)
                for key, item in value.items()
            }
        elif name in BRANCHES | LISTS and isinstance(value, list):
            whole = closed and not (
                (name == "allOf" and len(value) > 1) or (name in BRANCHES and beside)
            )
            prepared[name] = [
                _prepare(item, closed=whole, path=f"{here}/{i}", shared=shared)
                for i, item in enumerate(value)
            ]
        elif name in SINGLE:
            whole = closed and name not in ("if", "then", "else", "not")
            prepared[name] = _prepare(value, closed=whole, path=here, shared=shared)
        else:
            prepared[name] = value
    if closed_here and "properties" in prepared and not OPEN & set(prepared):
        prepared["additionalProperties"] = False
    return prepared


def _with_names(schema: dict[str, Any]) -> dict[str, Any]:
    """Write the names that a record may have as properties or patterns, which can be followed.

    As Zod writes `z.record(z.enum([...]), ...)`, and names with a pattern or a length.
    """
    names = schema.get("propertyNames")
    if not isinstance(names, dict) or {"properties", "patternProperties"} & set(schema):
        return schema
    said = set(names) - {"type"}
    value = schema.get("additionalProperties", True)
    rest = {
        key: item
        for key, item in schema.items()
        if key not in ("propertyNames", "additionalProperties")
    }
    if said == {"enum"} and all(isinstance(name, str) for name in names["enum"]):
        properties = dict.fromkeys(names["enum"], value)
        return {**rest, "properties": properties, "additionalProperties": False}
    if said == {"const"} and isinstance(names["const"], str):
        return {**rest, "properties": {names["const"]: value}, "additionalProperties": False}
    if said == {"pattern"}:
        pattern = names["pattern"]
    elif said and said <= {"minLength", "maxLength"}:
        pattern = f"^.{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    else:
        return schema
    return {**rest, "patternProperties": {pattern: value}, "additionalProperties": False}


def _evaluated(schema: dict[str, Any]) -> dict[str, Any]:
    """Write unevaluatedProperties as additionalProperties where nothing else evaluates any."""
    others = {"$ref", "allOf", "anyOf", "oneOf", "if", "dependentSchemas", "additionalProperties"}
    if "unevaluatedProperties" not in schema or others & set(schema):
        return schema
    rest = {key: item for key, item in schema.items() if key != "unevaluatedProperties"}
    return {**rest, "additionalProperties": schema["unevaluatedProperties"]}


def _parts_of_objects(schema: Any, *, part: bool) -> Iterator[str]:  # noqa: ANN401
    """Yield the references to what describes an object together with something else."""
    if isinstance(schema, list):
        for item in schema:
            yield from _parts_of_objects(item, part=part)
    if not isinstance(schema, dict):
        return
    reference = schema.get("$ref")
    if isinstance(reference, str) and (part or "properties" in schema):
        yield reference
    for name, value in schema.items():
        several = isinstance(value, list) and len(value) > 1
        joins = (name == "allOf" and several) or (name in BRANCHES and "properties" in schema)
        yield from _parts_of_objects(value, part=joins or (part and name in BRANCHES))
