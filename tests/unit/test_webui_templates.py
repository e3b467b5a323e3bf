"""The host takes a template as jinja: it renders as the template itself does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import gptq_loader_plugin as gptq
from gptq_loader_extensions.webui.templates import template_for
from gptq_loader_plugin.chat.templates import CardTemplate, ChatML, JinjaTemplate
from gptq_loader_plugin.chat.to_jinja import as_jinja

if TYPE_CHECKING:
    from pathlib import Path

ALPACA = "Below is an instruction.\n\n### Instruction:\n{prompt}\n\n### Response:\n"
LLAMA_2 = "[INST] <<SYS>>\n{system_message}\n<</SYS>>\n{prompt}[/INST]\n"
MARKED = '<|user|>\n{prompt} "quoted" {{braces}} \\n \N{GRINNING FACE}<|assistant|>\n'
TALK = [
    {"role": "user", "content": "One {{ 1 + 1 }} <b>?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "Five?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def rendered(jinja: str, messages: list[dict[str, str]], *, answer: bool = True) -> str:
    template = ImmutableSandboxedEnvironment(trim_blocks=True).from_string(jinja)
    return template.render(messages=messages, add_generation_prompt=answer)


@pytest.mark.parametrize(
    "template", [ChatML(), *(CardTemplate(it) for it in (ALPACA, LLAMA_2, MARKED))]
)
@pytest.mark.parametrize("length", [1, 3, 5])
def test_jinja_renders_as_the_template_does(template: Any, length: int) -> None:
    jinja = as_jinja(template)
    for answer in (True, False):
        expected = template.render(TALK[:length], add_generation_prompt=answer)
        assert rendered(jinja, TALK[:length], answer=answer) == expected


@pytest.mark.parametrize("template", [ChatML(), CardTemplate(LLAMA_2)])
def test_a_system_message_is_where_the_template_has_it(template: Any) -> None:
    messages = [SYSTEM, *TALK]
    assert rendered(as_jinja(template), messages) == template.render(messages)


def test_without_a_place_for_it_a_system_message_opens_the_first_turn() -> None:
    jinja = as_jinja(CardTemplate(ALPACA))
    opened = {"role": "user", "content": "Be brief.\n\nHello"}
    hello = {"role": "user", "content": "Hello"}
    assert rendered(jinja, [SYSTEM, hello]) == CardTemplate(ALPACA).render([opened])


def test_a_checkpoints_own_jinja_is_left_as_it_is() -> None:
    assert as_jinja(JinjaTemplate("{{ messages }}")) == "{{ messages }}"


@dataclass(frozen=True)
class Numbered:
    """A template whose turns depend on more than what stands around them."""

    name: str = "numbered"
    source: str = "a plugin"
    stop: tuple[str, ...] = ()

    def render(self, messages: Any, *, add_generation_prompt: bool = True) -> str:
        return "".join(f"{i}: {it['content']}\n" for i, it in enumerate(messages))

    def encode(self, messages: Any, tokenizer: Any, *, add_generation_prompt: bool = True) -> Any:
        raise NotImplementedError


def test_a_template_that_jinja_would_get_wrong_is_refused() -> None:
    with pytest.raises(
        gptq.TemplateError, match="the template numbered cannot be written as jinja"
    ):
        as_jinja(Numbered())


def test_our_rules_find_it(tmp_path: Path) -> None:
    plugins = gptq.Plugins(installed=True)
    assert template_for(tmp_path, plugins) is None
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 7, "<|im_end|>": 8}')
    template = template_for(tmp_path, plugins)
    assert template is not None
    assert template.chatml
    card = "---\nprompt_template: 'USER: {prompt} ASSISTANT:'\n---\n"
    (tmp_path / "README.md").write_text(card)
    template = template_for(tmp_path, plugins)
    assert template is not None
    assert not template.chatml
    assert rendered(template.jinja, TALK[:1]) == "USER: One {{ 1 + 1 }} <b>? ASSISTANT:"
    named = template_for(tmp_path, plugins, named="chatml")
    assert named is not None
    assert named.chatml
