"""Render chat templates, as transformers does; run as a process of its own by `jinja_process`.

A chat template is a program out of a checkpoint, so it is run where it can be stopped. This file
imports nothing of the package, and of others jinja2 alone: it starts in a tenth of a second.

A request is a line of JSON, `[template, variables]`; so is the answer, `{"text": ...}` or
`{"error": ..., "line": ...}`.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["answer", "compile_template"]

LONGEST = 1 << 26  # characters of a prompt


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks what an assistant said: it renders its content."""

    tags = {"generation"}  # noqa: RUF012 - jinja's own name, and its way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Read the block and leave its marks out."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Namespace(jinja2.utils.Namespace):
    """A namespace that takes no private name, as transformers' does."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - dict's
        own, args = args[0], args[1:]
        values: dict[Any, Any] = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: object) -> None:
        """Set a value."""
        _check_name(name)
        super().__setitem__(name, value)


class Dict:
    """`dict(...)`, and nothing else of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:  # noqa: ANN401 - dict's
        """Make one."""
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:  # noqa: ANN401 - dict's
        """Make one of some keys."""
        return dict.fromkeys(*args)


@lru_cache(maxsize=16)
def compile_template(text: str) -> jinja2.Template:
    """Compile a template, with what transformers gives one."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise, strftime_now=_now, dict=Dict(), namespace=Namespace
    )
    return environment.from_string(text)


def answer(template: str, variables: dict[str, Any]) -> dict[str, Any]:
    """Render a template; whatever goes wrong in it is part of the answer."""
    try:
        text = compile_template(template).render(**variables)
    except jinja2.TemplateSyntaxError as error:
        return {"error": str(error.message), "line": error.lineno}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it calls itself without an end, or is nested too deeply"}
    except Exception as error:  # noqa: BLE001 - a template's, whatever it is
        return {"error": str(error) or type(error).__name__}
    if len(text) > LONGEST:
        return {"error": f"it makes a prompt of {len(text):,} characters"}
    return {"text": text}


def main() -> None:
    """Answer requests until there are no more."""
    for line in sys.stdin:
        template, variables = json.loads(line)
        sys.stdout.write(json.dumps(answer(template, variables)) + "\n")
        sys.stdout.flush()


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(layout: str) -> str:
    return datetime.now().strftime(layout)  # noqa: DTZ005 - the user's own time, as transformers'


def _tojson(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - transformers' signature
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """Write JSON; jinja's own filter would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


if __name__ == "__main__":
    main()
