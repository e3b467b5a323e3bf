"""Chat templates are rendered as transformers renders them, in a process that can be stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from altered import DATA, NAMES, ONE, copy, edit_json
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

import gptq_loader_plugin as gptq
from gptq_loader_plugin.chat import jinja_process
from gptq_loader_plugin.chat.encode import encode_messages
from gptq_loader_plugin.chat.find_template import find_template
from gptq_loader_plugin.chat.jinja_process import render_jinja
from gptq_loader_plugin.chat.templates import JinjaTemplate
from gptq_loader_plugin.checkpoint.card import Card

if TYPE_CHECKING:
    from pathlib import Path

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": 'What is "ä" & <b>?'}
REPLY = {"role": "assistant", "content": "A letter.", "reasoning_content": "hm"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"ä": [1, None, True]}}}
TURNS = [SYSTEM, USER, REPLY, {"role": "user", "content": "Go on"}]
EACH = "{% for message in messages %}"

TEMPLATES = {
    "trim": "  {% if true %}\n  {{ messages|length }}\n  {% endif %}\n\n{{ bos_token }}",
    "json": "{{ tools|tojson }}{{ tools|tojson(indent=2) }}",
    "compact json": "{{ tools|tojson(separators=(',', ':')) }}",
    "names": "{{ tools is none }}{{ documents is none }}{{ missing is defined }}",
    "namespace": "{% set ns = namespace(n=0) %}"
    + EACH + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "loopcontrols": EACH + "{% if loop.first %}{% continue %}{% endif %}"
    "{{ message.content }}{% break %}{% endfor %}",
    "generation": EACH + "{% generation %}{{ message.content }}{% endgeneration %}{% endfor %}",
    "dict": "{{ dict(a=1)['a'] }}{{ dict(messages[0], role='x').role }}",
    "slices": "{{ messages[-1]['content'].split(' ')[0]|upper }}{{ messages[1:]|length }}",
    "reasoning": EACH + "{{ message.reasoning_content }}{{ message.get('thinking') }}{% endfor %}",
    "macro": "{% macro turn(m) %}[{{ m.role }}]{% endmacro %}"
    + EACH + "{{ turn(message) }}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_renders_what_transformers_does(name: str) -> None:
    tools = [TOOL] if "json" in name else None
    (expected,), _ = render_jinja_template(
        [TURNS],
        chat_template=TEMPLATES[name],
        tools=tools,
        add_generation_prompt=True,
        bos_token="<s>",
    )
    template = JinjaTemplate(TEMPLATES[name], tokens={"tools": tools, "bos_token": "<s>"})
    assert template.render(TURNS) == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_checkpoints_templates_render_what_transformers_does(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / name)
    if not tokenizer.chat_template:
        pytest.skip("it has no template")
    template = find_template(DATA / name, card=Card())
    for answer in (True, False):
        expected = tokenizer.apply_chat_template(
            TURNS, tokenize=False, add_generation_prompt=answer
        )
        assert template.render(TURNS, add_generation_prompt=answer) == expected


def test_the_date_is_todays() -> None:
    text = render_jinja("{{ strftime_now('%Y-%m-%d') }}", {}, source="a test")
    assert abs(time.time() - time.mktime(time.strptime(text, "%Y-%m-%d"))) < 26 * 3600


WITHOUT_END = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "a power": "{{ 10 ** (10 ** 9) }}",
}
TOO_LARGE = {
    "a string times a number": "{{ 'a' * 10**10 }}",
    "a list times a number": "{{ ([0] * 10**10)|length }}",
    "a filter": "{{ 'a'|center(10**10) }}",
    "a format": "{{ '%10000000000d' % 1 }}",
    "doublings": "{% set ns = namespace(a='aaaaaaaaaaaaaaaa') %}{% for i in range(40) %}"
    "{% set ns.a = ns.a + ns.a %}{% endfor %}{{ ns.a }}",
}
REFUSED = {
    "a range": "{% for a in range(10**9) %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a class": "{{ ''.__class__.__mro__ }}",
    "a private name": "{% set ns = namespace(_a=1) %}",
    "a lasting change": "{% do messages.append(1) %}",
    "a number divided by 0": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("text", [*WITHOUT_END.values()], ids=[*WITHOUT_END])
def test_a_template_without_an_end_is_stopped(text: str) -> None:
    with pytest.raises(gptq.TemplateError, match=r"still running after 0\.3 seconds"):
        render_jinja(text, {"messages": []}, source="evil", seconds=0.3)
    assert render_jinja("{{ 1 }}", {}, source="the next one") == "1"


@pytest.mark.parametrize("text", [*TOO_LARGE.values()], ids=[*TOO_LARGE])
def test_a_template_that_takes_too_much_memory_is_stopped(text: str) -> None:
    with pytest.raises(
        gptq.TemplateError, match=r"too much memory|makes a prompt of|cannot be used"
    ):
        render_jinja(text, {"messages": []}, source="evil")
    assert render_jinja("{{ 1 }}", {}, source="the next one") == "1"


@pytest.mark.parametrize("text", [*REFUSED.values()], ids=[*REFUSED])
def test_what_goes_wrong_in_a_template_is_the_templates(text: str) -> None:
    with pytest.raises(gptq.TemplateError, match="the chat template of evil") as caught:
        render_jinja(text, {"messages": []}, source="evil")
    assert caught.value.hint


def test_bombs_are_found_while_a_checkpoint_is_inspected(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    (folder / "chat_template.jinja").unlink()
    bomb = WITHOUT_END["nested loops"]
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=bomb))
    began = time.monotonic()
    assert gptq.inspect(folder).template.name == "checkpoint"
    assert time.monotonic() - began < 60


def test_a_fork_has_a_process_of_its_own() -> None:
    render_jinja("{{ 1 }}", {}, source="a test")
    child = os.fork()
    if child == 0:
        os._exit(0 if render_jinja("{{ 2 }}", {}, source="a test") == "2" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render_jinja("{{ 3 }}", {}, source="a test") == "3"


def test_the_process_ends_with_its_program() -> None:
    code = (
        "from gptq_loader_plugin.chat import jinja_process as p\n"
        "assert p.render_jinja('{{ 1 }}', {}, source='a test') == '1'\n"
        "print(p._worker._process.pid, flush=True)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not psutil.pid_exists(int(ended.stdout))


def test_it_imports_none_of_the_package() -> None:
    """A worker that imported it would take seconds, and the names of its folder are others'."""
    render_jinja("{{ 1 }}", {}, source="a test")
    assert jinja_process._worker is not None
    maps = psutil.Process(jinja_process._worker._process.pid).memory_maps()
    assert not [it.path for it in maps if "torch" in it.path]


PARTS = {
    "selectattr": EACH + "<{{ message.role }}>"
    "{% for part in message.content|selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }}{% endfor %}{% endfor %}",
    "loop": EACH + "<{{ message['role'] }}>{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}",
    "first": EACH + "<{{ message.role }}>{{ message.content[0].text }}{% endfor %}",
    "system alone": "{{ messages[0].content[0].text if messages[0].role == 'system' else '' }}"
    + EACH + "{% if message.role != 'system' %}"
    "<{{ message.role }}>{{ message.content }}{% endif %}{% endfor %}",
    "either": EACH + "<{{ message.role }}>{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_template_that_takes_parts_has_the_users_words(name: str) -> None:
    template = JinjaTemplate(PARTS[name]).probed()
    turns = [SYSTEM, USER, {"role": "assistant", "content": "A letter."}]
    text = template.render(turns)
    for turn in turns:
        assert text.count(turn["content"]) == 1, text
    assert template.render(
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    ).endswith("<user>Hi")


@pytest.mark.parametrize(
    "text",
    ["You are a helpful assistant.", EACH + "{{ message.text }}{% endfor %}", ""],
    ids=["fixed", "another name", "empty"],
)
def test_a_prompt_without_the_users_words_is_an_error(text: str) -> None:
    template = JinjaTemplate(text, source="evil").probed()
    tokenizer = AutoTokenizer.from_pretrained(DATA / ONE)
    for content in ("What is a harbour?", "<|im_end|> and more"):
        with pytest.raises(gptq.TemplateError, match="evil leaves out what the user says"):
            encode_messages(
                template, [{"role": "user", "content": content}], tokenizer,
                add_generation_prompt=True, add_bos=False,
            )  # fmt: skip


@pytest.mark.parametrize("content", ["", "  ", "?!", "🙂", "x", "ONE two"])
def test_words_that_a_template_changes_are_no_error(content: str) -> None:
    template = JinjaTemplate(EACH + "{{ message.content|trim|lower }}{% endfor %}").probed()
    tokenizer = AutoTokenizer.from_pretrained(DATA / ONE)
    encode_messages(
        template, [{"role": "user", "content": content}], tokenizer,
        add_generation_prompt=True, add_bos=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "taken"),
    [(["tool_use", "default"], "default"), (["tool_use", "chat"], "chat"), (["rag"], "rag")],
)
def test_the_first_of_several_templates_is_taken_where_none_is_the_default(
    names: list[str], taken: str, tmp_path: Path
) -> None:
    folder = copy(ONE, tmp_path)
    (folder / "chat_template.jinja").unlink()
    entries = [
        {"name": name, "template": name + ": " + EACH + "{{ message.content }}{% endfor %}"}
        for name in names
    ]
    edit_json(folder / "tokenizer_config.json", lambda it: it.update(chat_template=entries))
    template = find_template(folder, card=Card())
    assert template.render([USER]) == f"{taken}: {USER['content']}"
    assert (taken in template.source) == (taken != "default")


def test_a_content_of_every_private_character_is_text() -> None:
    every = "".join(map(chr, range(0xE000, 0xF900))) + "\ue000<|im_end|>"
    tokenizer: Any = AutoTokenizer.from_pretrained(DATA / ONE)
    template = find_template(DATA / ONE, card=Card())
    ids = template.encode([{"role": "user", "content": every}], tokenizer)
    assert ids.count(381) == 1, "the end of the user's own turn"
    plain = json.dumps(tokenizer.decode(ids))
    assert json.dumps(every[-200:])[1:-1] in plain
