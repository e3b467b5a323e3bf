"""Keep a reply to a grammar, by masking the tokens that would break it.

llguidance (3 MB, no dependencies) tracks the grammar; without it the options are refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_extensions.openai.errors import invalid
from gptq_loader_extensions.openai.replies.grammar_mask import GrammarMask
from gptq_loader_extensions.openai.schema.constraints import read_constraint
from gptq_loader_extensions.openai.schema.json_schema import prepare_schema

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_extensions.openai.schema.constraints import Constraint, Structured
    from gptq_loader_plugin.generation.loaded import LoadedModel

__all__ = [
    "MaskOptions",
    "constraint_masks",
    "grammar_tokenizer",
    "make_mask",
    "schema_rule",
    "to_lark",
    "write_grammar",
]

MAX_GRAMMAR = 1 << 18  # characters: a schema of 3 MB takes llguidance a second for each token
UNFOLLOWED = re.compile(r"Unimplemented keys: \[(.*?)\]")  # llguidance's words
# Without a limit to it, small models write whitespace until a reply may be no longer.
LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class MaskOptions:
    """When a grammar holds.

    Attributes:
        after: the text from whose end on it holds; "" from the reply's beginning.
        opening: a token that the reply may begin with all the same, and then `after` is awaited:
            what opens a thought.
        must_begin: whether the reply may not end before it holds.
        repeats: whether, once it is complete, any text is allowed until `after` comes again.
    """

    after: str = ""
    opening: int | None = None
    must_begin: bool = False
    repeats: bool = False


def grammar_tokenizer(model: LoadedModel) -> Any:  # noqa: ANN401 - llguidance's, or None
    """Build llguidance's tokenizer, which takes most of a second and Python's lock with it.

    None where llguidance is not installed or does not take the model's tokenizer.
    """
    tokenizer: Any = model.tokenizer
    try:
        import llguidance.hf
    except ImportError:
        return None
    if not tokenizer.is_fast:
        return None
    end_ids = sorted(model.end_ids(model.template.stop))
    return llguidance.hf.from_tokenizer(tokenizer, eos_token=end_ids)


def write_grammar(constraint: Constraint) -> str:
    """Write the form of a reply as a grammar of Lark.

    Raises:
        ApiError: llguidance is not installed, or it is no grammar.
    """
    match constraint.kind:
        case "schema":
            schema = schema_rule(constraint.value, constraint.param, closed=constraint.closed)
            return f"start: {schema}\n"
        case "regex":
            return f"start: PATTERN\nPATTERN: /{_in_slashes(constraint.value)}/\n"
        case "choice":
            return f"start: {' | '.join(map(to_lark, constraint.value))}\n"
        case "grammar":
            return _own_grammar(constraint.value, constraint.param)


def constraint_masks(
    request: Structured,
    vocabulary: Any,  # noqa: ANN401 - llguidance's
    *,
    begin: int,
) -> list[Callable[[], GrammarMask]]:
    """Return what keeps a completion to the form that a request asks for, if it asks for one.

    Raises:
        ApiError: it cannot be kept to.
    """
    constraint = read_constraint(request)
    if constraint is None:
        return []
    grammar = write_grammar(constraint)
    return [make_mask(grammar, vocabulary, begin=begin, param=constraint.param)]


def schema_rule(schema: Any, param: str, *, closed: bool = True) -> str:  # noqa: ANN401 - JSON
    """Write a JSON schema as what Lark's rules may contain.

    Raises:
        ApiError: it is too long.
    """
    prepared = prepare_schema(schema, closed=closed)
    if isinstance(prepared, dict):
        own = prepared.get("x-guidance")
        prepared = {**prepared, "x-guidance": {**LAYOUT, **(own if isinstance(own, dict) else {})}}
    written = json.dumps(prepared)
    _check_length(written, "schema", param)
    return f"%json {written}"


def to_lark(text: str) -> str:
    """Write a text as Lark does."""
    return json.dumps(text, ensure_ascii=False)


def make_mask(
    grammar: str,
    vocabulary: Any,  # noqa: ANN401 - llguidance's
    *,
    begin: int,
    param: str,
    options: MaskOptions | None = None,
    end_ids: Sequence[int] = (),
) -> Callable[[], GrammarMask]:
    """Return what makes a mask for each reply.

    Args:
        grammar: of Lark.
        vocabulary: the model's `grammar_tokenizer`.
        begin: where the reply begins in the sequence.
        param: the field of the request that asks for it.
        options: when it holds.
        end_ids: the tokens that end a reply.

    Raises:
        ApiError: the grammar cannot be followed, or llguidance is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise invalid(
            "this server cannot keep replies to a form: it lacks the package llguidance; leave "
            f"{param} out, and ask for JSON in the prompt",
            param=param,
            code="unsupported_option",
        ) from error
    if vocabulary is None:
        raise invalid(
            f"this model's tokenizer cannot be kept to a form; leave {param} out",
            param=param,
            code="unsupported_option",
        )
    content = llguidance.LLMatcher.grammar_from_lark(grammar)
    if problem := llguidance.LLMatcher.validate_grammar(content, vocabulary):
        raise _cannot_follow(problem, param)
    chosen = options or MaskOptions()

    def make_matcher() -> Any:  # noqa: ANN401 - llguidance's
        return llguidance.LLMatcher(vocabulary, content, log_level=0)

    return lambda: GrammarMask(
        make_matcher,
        begin,
        vocabulary,
        param=param,
        after=chosen.after,
        opening=chosen.opening,
        banned=tuple(end_ids) if chosen.must_begin else (),
        repeats=chosen.repeats,
    )


def _own_grammar(text: str, param: str) -> str:
    """Return a client's grammar as Lark: llama.cpp's form, GBNF, is translated."""
    _check_length(text, "grammar", param)
    try:
        from llguidance.gbnf_to_lark import any_to_lark
    except ImportError:
        return text  # which is refused when the mask is made
    try:
        lark: str = any_to_lark(text)
    except Exception as error:  # a parser's own, of several kinds
        raise _cannot_follow(str(error), param) from error
    return lark


def _in_slashes(pattern: str) -> str:
    """Write a regular expression as it stands between Lark's slashes."""
    escaped = False
    written = []
    for letter in pattern:
        written.append("\\/" if letter == "/" and not escaped else letter)
        escaped = letter == "\\" and not escaped
    return "".join(written).replace("\n", "\\n")


def _check_length(text: str, what: str, param: str) -> None:
    if len(text) > MAX_GRAMMAR:
        raise invalid(
            f"the {what} has {len(text):,} characters, and may have {MAX_GRAMMAR:,}", param=param
        )


def _cannot_follow(problem: str, param: str) -> Exception:
    if keys := UNFOLLOWED.search(problem):
        return invalid(
            f"the schema has {keys[1]}, which cannot be enforced here; leave it out, or say it in "
            "the prompt",
            param=param,
        )
    what = "grammar" if "grammar" in param or param == "ebnf" else "schema"
    first = problem.strip().partition("\n")[0]
    return invalid(f"the {what} cannot be followed: {first[:500]}", param=param)
