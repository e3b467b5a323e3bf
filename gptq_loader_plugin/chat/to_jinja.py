"""Write any template as jinja, which is what other programs take."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from gptq_loader_plugin.chat.templates import JinjaTemplate
from gptq_loader_plugin.errors import TemplateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.chat.template import Template

__all__ = ["as_jinja"]

SYSTEM, QUESTION, REPLY, NEXT = "gptq-system", "gptq-question", "gptq-reply", "gptq-next"


def as_jinja(template: Template) -> str:
    """Write a template as jinja: its own text, or one put together from what it renders.

    Raises:
        TemplateError: its turns depend on more than what stands around their contents.
    """
    if isinstance(template, JinjaTemplate):
        return template.text
    jinja = _put_together(template)
    for messages in _samples(template):
        for answer in (True, False) if messages[-1]["role"] == "user" else (False,):
            rendered = template.render(messages, add_generation_prompt=answer)
            if _render(jinja, messages, answer=answer) != rendered:
                raise _cannot(template)
    return jinja


def _put_together(template: Template) -> str:
    """Write down what `template` puts before, between and after contents."""
    question, answered, then = (
        _turn("user", QUESTION),
        _turn("assistant", REPLY),
        _turn("user", NEXT),
    )
    first, after = _around(template, [question], QUESTION)
    _, unanswered = _around(template, [question], QUESTION, answer=False)
    _, end = _around(template, [question, answered], REPLY, answer=False)
    _, following = _around(template, [question, answered, then], REPLY)
    later = following.partition(NEXT)[0].removeprefix(end)
    system = f"{{{{ {_quoted(first)} }}}}{{{{ ns.system }}}}{{{{ {_quoted(chr(10) * 2)} }}}}"
    if _takes_system(template):
        before, between = _around(template, [_turn("system", SYSTEM), question], SYSTEM)
        between = between.partition(QUESTION)[0]
        system = f"{{{{ {_quoted(before)} }}}}{{{{ ns.system }}}}{{{{ {_quoted(between)} }}}}"
    return (
        "{% set ns = namespace(system=none, first=true) %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set ns.system = message['content'] %}"
        "{% elif message['role'] == 'user' %}{% if not ns.first %}"
        f"{{{{ {_quoted(later)} }}}}{{% elif ns.system is none %}}{{{{ {_quoted(first)} }}}}"
        f"{{% else %}}{system}{{% endif %}}{{% set ns.first = false %}}"
        "{{ message['content'] }}{% if add_generation_prompt or not loop.last %}"
        f"{{{{ {_quoted(after)} }}}}{{% else %}}{{{{ {_quoted(unanswered)} }}}}{{% endif %}}"
        f"{{% else %}}{{{{ message['content'] }}}}{{{{ {_quoted(end)} }}}}{{% endif %}}"
        "{% endfor %}"
    )


def _around(
    template: Template, messages: Sequence[dict[str, str]], content: str, *, answer: bool = True
) -> tuple[str, str]:
    before, marker, after = template.render(messages, add_generation_prompt=answer).partition(
        content
    )
    if not marker:
        raise _cannot(template)
    return before, after


def _takes_system(template: Template) -> bool:
    try:
        template.render([_turn("system", SYSTEM), _turn("user", QUESTION)])
    except TemplateError:
        return False
    return True


def _samples(template: Template) -> list[list[dict[str, str]]]:
    turns = [_turn("user", "One?"), _turn("assistant", "Two."), _turn("user", "Three?")]
    turns += [_turn("assistant", "Four."), _turn("user", "Five?")]
    samples = [turns[:count] for count in (1, 2, 3, 5)]
    if _takes_system(template):
        samples += [[_turn("system", "Be brief."), *sample] for sample in samples]
    return samples


def _render(jinja: str, messages: list[dict[str, str]], *, answer: bool) -> str:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(jinja).render(messages=messages, add_generation_prompt=answer)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _quoted(text: str) -> str:
    """Write a text as jinja's literal."""
    return json.dumps(text, ensure_ascii=False)


def _cannot(template: Template) -> TemplateError:
    return TemplateError(
        f"the template {template.name} cannot be written as jinja, which another program needs",
        hint="choose another: chatml, or a .jinja file",
    )
