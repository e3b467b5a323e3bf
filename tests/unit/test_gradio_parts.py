"""The page's parts without a browser: long work, what is drawn, and two replies side by side."""

from __future__ import annotations

import threading
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import gptq_loader_plugin as gptq
from gptq_loader_extensions.gradio.error_messages import alert, format_error
from gptq_loader_extensions.gradio.jobs.comparing import by_turns, difference_html
from gptq_loader_extensions.gradio.jobs.downloads import Speed
from gptq_loader_extensions.gradio.jobs.models import ReplyStart
from gptq_loader_extensions.gradio.jobs.progress import Finished, progress_bar, run_with_progress
from gptq_loader_extensions.gradio.jobs.reply import raw_prompt
from gptq_loader_extensions.gradio.storage.presets import CUSTOM, PRESETS, own_sampling, preset_of
from gptq_loader_extensions.gradio.views.facts import facts_html
from gptq_loader_extensions.gradio.views.plan_view import memory_html, memory_of, plan_html
from gptq_loader_plugin.errors import GPTQLoaderError, PromptTooLong
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
FIRST = "gptq-4bit-32g-act-sym"
ENVIRON = {"GPTQ_LOADER_PLUGINS": "core,kernel-dense,kernel-reference"}
GREEDY = GenerateOptions(temperature=0, max_new_tokens=6)


# Long work


def test_work_is_watched_to_its_end() -> None:
    def work(on_progress: Any) -> str:
        for i in range(100):
            on_progress(Progress("weights", i, 100))
        on_progress(Progress("self-check", 0, 2, "checks"))
        return "value"

    *steps, last = run_with_progress(work)
    assert [step.stage for step in steps if isinstance(step, Progress)][-1] == "self-check"
    assert len(steps) < 20, "and not redrawn a hundred times"
    assert isinstance(last, Finished)
    assert last.value == "value"


def test_work_that_fails_is_raised_where_it_is_watched() -> None:
    def work(on_progress: Any) -> None:
        on_progress(Progress("weights", 0, 2))
        raise GPTQLoaderError("no", hint="yes")

    with pytest.raises(GPTQLoaderError, match="no"):
        list(run_with_progress(work))


def test_work_goes_on_when_nobody_watches() -> None:
    ended = threading.Event()

    def work(on_progress: Any) -> None:
        on_progress(Progress("weights", 0, 2))
        time.sleep(0.05)
        ended.set()

    running = run_with_progress(work)
    next(running)
    running.close()  # type: ignore[attr-defined]  # a generator
    assert ended.wait(5)


def test_a_bar_says_how_far() -> None:
    bar = progress_bar(Progress("download", 5_000_000, 20_000_000, detail="<b>"))
    assert 'value="0.2500"' in bar
    for words in ("Downloading", "25%", "5 MB of 20 MB", "&lt;b&gt;"):
        assert words in bar
    assert "value=" not in progress_bar(Progress("waiting", 0, 0)), "an end that is not known"
    assert "1 of 2 checks" in progress_bar(Progress("self-check", 1, 2, "checks"))


# What is drawn


def test_the_facts_say_where_each_came_from() -> None:
    report = gptq.inspect(CHECKPOINTS / FIRST)
    html = unescape(facts_html(report))
    assert "<th scope='row'>Bits</th><td>4</td><td>quantize_config.json</td>" in html
    assert "<th scope='row'>Damping</th><td>0.1</td><td>quantize_config.json, meta</td>" in html
    assert "stops at <|im_end|>" in html


def test_the_plan_shows_every_answer() -> None:
    plan = gptq.explain(
        CHECKPOINTS / FIRST, device="cpu", plugins=gptq.Plugins(installed=True, environ=ENVIRON)
    )
    html = unescape(plan_html(plan))
    for name, words in plan.choices[0].reasons():
        assert f"<th scope='row'>{name}</th><td>{words}</td>" in html
    assert html.count("class=chosen") == 1
    memory = memory_of(plan)
    assert plan.kv_bytes_per_token is not None
    assert (memory.context, memory.kv) == (512, 512 * plan.kv_bytes_per_token)
    assert memory_of(plan, context=100).kv == 100 * plan.kv_bytes_per_token
    drawn = memory_html(memory, before=10**6, after=2 * 10**6)
    assert "the process held 1 MB before, and 2 MB after" in drawn
    assert drawn.count("<i class=") == 4, "the three parts, and what is free"


def test_errors_are_sentences() -> None:
    long = PromptTooLong("the prompt is long", tokens=9, context=5, hint="drop-oldest")
    assert format_error(long) == "The prompt is long. Shorten the message, or the system message."
    assert format_error(GPTQLoaderError("a", hint="b")) == "A. B."
    assert (
        format_error(RuntimeError("")) == "The model failed: RuntimeError. The terminal says more."
    )
    assert alert("<b>") == '<div role="alert">&lt;b&gt;</div>'
    assert alert("") == ""


# Side by side


class Words:
    """A model that says words, and takes a second for each."""

    loaded = None

    def __init__(self, clock: list[float], *words: str) -> None:
        self.clock, self.words = clock, words

    def stream(self, prepare: Any, options: Any, cancel: threading.Event) -> Iterator[Any]:
        yield ReplyStart(1, 10)
        for i, word in enumerate(self.words):
            self.clock[0] += 1
            last = i + 1 == len(self.words)
            yield gptq.Piece(word, i + 1, "stop" if last or cancel.is_set() else None)


def test_sides_take_turns_and_are_timed_alone() -> None:
    now = [0.0]
    sides: Any = (Words(now, "a", "b", "c"), Words(now, "a", "x"))
    states = list(
        by_turns(sides, raw_prompt(""), GREEDY, cancel=threading.Event(), clock=lambda: now[0])
    )
    assert [at for at, _ in states][:6] == [0, 1, 0, 1, 0, 1]
    ends = {at: state for at, state in states if not state.running}
    assert (ends[0].reply, ends[1].reply) == ("abc", "ax")
    for end in ends.values():
        assert "1.0 a second" in end.status, "and not half of it"


def test_where_replies_differ() -> None:
    assert difference_html("same", "same") == "<p>Both replies are the same.</p>"
    assert difference_html("a", "b") == "<p>The replies differ from the first character.</p>"
    assert difference_html("Paris is", "Paris <b>") == (
        "<p>The replies are the same for 6 characters, up to “Paris”. Then the first goes on "
        "<mark>is</mark> and the second <mark>&lt;b&gt;</mark></p>"
    )


def test_the_speed_is_that_of_the_last_seconds() -> None:
    times = iter([0.0, 1.0, 2.0, 12.0, 13.0])
    speed = Speed(lambda: next(times))
    assert speed.add(0) is None
    assert speed.add(100) == 100
    assert speed.add(300) == 150
    assert speed.add(400) is None, "what stood still for so long has no speed"
    assert speed.add(410) == 10
    bar = progress_bar(Progress("download", 2_000_000, 10_000_000), speed=100_000)
    assert "100 kB/s, 1 min 20 s left" in bar


def test_presets_fill_in_what_a_checkpoint_recommends() -> None:
    def model(**values: Any) -> Any:
        config = SimpleNamespace(to_diff_dict=lambda: values)
        return SimpleNamespace(model=SimpleNamespace(generation_config=config))

    assert own_sampling(model(temperature=0.6, top_k=20, pad_token_id=3)) == GenerateOptions(
        temperature=0.6, top_k=20
    )
    assert own_sampling(model(do_sample=False, temperature=0.6)) == PRESETS["Deterministic"]
    assert preset_of(GenerateOptions(max_new_tokens=9, repetition_penalty=1.1)) == "No repetition"
    assert preset_of(GenerateOptions(temperature=0.33)) == CUSTOM
