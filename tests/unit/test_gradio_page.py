"""The chat page without a browser: the reply's logic, the address, what it says when it cannot."""

from __future__ import annotations

import gc
import socket
import sys
import threading
import warnings
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import gptq_loader_plugin as gptq
from gptq_loader_extensions.gradio import GradioHost, gptq_hosts
from gptq_loader_extensions.gradio.about import head, model_name
from gptq_loader_extensions.gradio.conversation import Moment, answer, take_back
from gptq_loader_extensions.gradio.versions import known, to_pairs
from gptq_loader_plugin.checkpoint.card import Card
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid, PluginError, PromptTooLong
from gptq_loader_plugin.generate import Piece
from gptq_loader_plugin.options import GenerateOptions
from gptq_loader_plugin.template import ChatML

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ENVIRON = {"GPTQ_LOADER_PLUGINS": "core,kernel-dense,kernel-reference"}
CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints" / "gptq-4bit-32g-act-sym"
OPTIONS = GenerateOptions()
DEFAULTS = ["", 512, 0.7, 0.95, 40, 0.0, 1.0, None]  # the settings as the page hands them over
QUESTION = {"role": "user", "content": "Hello?"}


class FakeModel:
    """Gives one word after the other, or raises."""

    def __init__(self, words: Sequence[str] = ("One", " two"), *, finish: Any = "stop") -> None:
        self.words, self.finish = words, finish
        self.error: Exception | None = None
        self.warning = ""
        self.asked: list[dict[str, str]] = []
        self.given: GenerateOptions | None = None
        self.ended = False

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        options: GenerateOptions,
        *,
        when_too_long: str,
        cancel: threading.Event,
    ) -> Iterator[Piece]:
        self.asked, self.given = list(messages), options
        assert when_too_long == "drop-oldest"
        if self.error:
            raise self.error
        return self._pieces(cancel)

    def _pieces(self, cancel: threading.Event) -> Iterator[Piece]:
        try:
            for i, word in enumerate(self.words):
                if cancel.is_set():
                    yield Piece("", i, "cancelled")
                    return
                yield Piece(word, i + 1, warning="" if i else self.warning)
            yield Piece("", len(self.words), self.finish)
        finally:
            self.ended = True


class Clock:
    """Half a second passes between two looks at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def moments(model: Any, *, system: str = "", options: GenerateOptions = OPTIONS) -> list[Moment]:
    return list(
        answer(model, [QUESTION], options, system=system, cancel=threading.Event(), clock=Clock())
    )


def reply(moment: Moment) -> str:
    return moment.messages[-1]["content"]


def test_a_reply_grows_to_its_end() -> None:
    first, *growing, last = moments(FakeModel(["One", " two", " three"]))
    assert first == Moment((QUESTION,), "Reading the prompt …", running=True)
    assert [reply(it) for it in growing] == ["One", "One two", "One two three"]
    assert all(it.running for it in growing)
    assert not last.running
    assert reply(last) == "One two three"
    assert last.status == "3 tokens, 1.3 a second; the first after 0.50 s"


def test_a_fast_reply_is_not_redrawn_for_every_token() -> None:
    model = FakeModel(["w"] * 100)
    times = iter(i * 0.001 for i in range(1000))
    cancel = threading.Event()
    seen = list(
        answer(model, [QUESTION], OPTIONS, system="", cancel=cancel, clock=lambda: next(times))  # type: ignore[arg-type]
    )
    assert len(seen) <= 5
    assert reply(seen[-1]) == "w" * 100


def test_a_cancelled_reply_keeps_its_text() -> None:
    cancel = threading.Event()
    running = answer(
        FakeModel(["One", " two", " three"]),  # type: ignore[arg-type]
        [QUESTION],
        OPTIONS,
        system="",
        cancel=cancel,
        clock=Clock(),
    )
    next(running)
    next(running)
    cancel.set()
    (last,) = running
    assert reply(last) == "One"
    assert last.status.endswith("; stopped")
    assert not last.running


def test_a_reply_cancelled_before_its_first_word_gives_the_question_back() -> None:
    cancel = threading.Event()
    cancel.set()
    model: Any = FakeModel()
    *_, last = answer(model, [QUESTION], OPTIONS, system="", cancel=cancel)
    assert last == Moment((), "Stopped.", draft="Hello?")


@pytest.mark.parametrize(
    ("limit", "words"),
    [(2, "cut off at the most new tokens"), (512, "cut off where the context is full")],
)
def test_a_reply_that_was_cut_off_says_where(limit: int, words: str) -> None:
    options = GenerateOptions(max_new_tokens=limit)
    assert moments(FakeModel(finish="length"), options=options)[-1].status.endswith(words)


def test_a_system_message_comes_first_and_is_not_shown() -> None:
    model = FakeModel()
    last = moments(model, system="Be brief.")[-1]
    assert model.asked == [{"role": "system", "content": "Be brief."}, QUESTION]
    assert last.messages[0] == QUESTION
    moments(model, system="  ")
    assert model.asked == [QUESTION]


def test_take_back_takes_a_question_and_its_reply() -> None:
    talk = [QUESTION, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert take_back(talk) == ((talk[0], talk[1]), "b")
    assert take_back(talk[:2]) == ((), "Hello?")
    assert take_back([]) == ((), "")


def test_the_head_says_what_runs_and_escapes_it() -> None:
    plan = gptq.explain(
        CHECKPOINT, device="cpu", plugins=gptq.Plugins(installed=True, environ=ENVIRON)
    )
    model: Any = SimpleNamespace(
        plan=plan,
        config=plan.config,
        context=4096,
        template=ChatML(source="<script>"),
        warnings=("a label lies", "a label lies"),
        explain=plan.explain,
    )
    html = head(model)
    assert model_name(model) == CHECKPOINT.name
    assert "<script>" not in html
    text = unescape(html)
    for words in (plan.headline(), plan.explain(), "context 4,096", "act-order", "chatml"):
        assert words in text
    assert text.count("a label lies") == 1


def test_a_hub_reference_is_its_own_name() -> None:
    plan = SimpleNamespace(reference="owner/repo:branch", path=Path("/cache/1a2b"))
    assert model_name(SimpleNamespace(plan=plan)) == "owner/repo:branch"  # type: ignore[arg-type]


def test_options_that_a_version_does_not_know_are_left_out() -> None:
    def launch(self: object, *, port: int) -> None: ...

    assert known(launch, port=1, ssr_mode=False) == {"port": 1}
    talk = [QUESTION, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert to_pairs(talk) == [("Hello?", "a"), ("b", None)]


# The host


def test_the_host_is_offered_by_name() -> None:
    (host,) = gptq_hosts()
    assert host.name == "gradio"
    assert isinstance(host, gptq.Host)


def test_a_taken_port_is_said_to_be_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OptionInvalid, match=f"^port {port} is taken$") as caught:
            GradioHost().install(model=FakeModel(), port=port, open_browser=False)
    assert "--port" in caught.value.hint


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"port": 70_000}, "70000 is no port"),
        ({"host": "192.0.2.1"}, "192.0.2.1 is not an address of this machine"),
        ({"colour": "red"}, "no option colour"),
    ],
)
def test_an_address_that_cannot_be_is_an_error_in_words(where: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionInvalid, match=words):
        GradioHost().install(model=FakeModel(), open_browser=False, **where)


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(PluginError, match="needs gradio") as caught:
        GradioHost().install(model=FakeModel(), open_browser=False)
    assert caught.value.hint == "pip install 'gptq-loader-plugin[gradio]'"


def test_without_a_model_it_says_so() -> None:
    with pytest.raises(PluginError, match="needs a loaded model"):
        GradioHost().install()


# What is drawn


@pytest.fixture(scope="module")
def drawing() -> Iterator[Any]:
    """The module that draws; importing gradio leaves event loops open behind it."""
    pytest.importorskip("gradio")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        from gptq_loader_extensions.gradio import drawing

        gc.collect()
    return drawing


def stream(drawing: Any, model: FakeModel, values: Sequence[Any] = DEFAULTS) -> list[Any]:
    return list(drawing.stream_reply(model, (QUESTION,), values, before=(), draft="Hello?"))


def test_the_settings_reach_the_model(drawing: Any) -> None:
    model = FakeModel()
    stream(drawing, model, ["Be brief.", 7, 0, 0.5, 3, 0.1, 1.2, 42])
    assert model.given == GenerateOptions(
        max_new_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=42,
    )
    assert model.asked[0]["content"] == "Be brief."


def test_the_defaults_are_those_of_the_options(drawing: Any) -> None:
    model = FakeModel()
    stream(drawing, model)
    assert model.given == OPTIONS


def test_a_reply_hands_out_what_stops_it(drawing: Any) -> None:
    model = FakeModel(["w"] * 1000)
    running = drawing.stream_reply(model, (QUESTION,), DEFAULTS, before=(), draft="Hello?")
    conversation, cancel, problem, _, message, *_ = next(running)
    assert (conversation, problem) == ((QUESTION,), "")
    assert message["value"] == "", "what was sent leaves the message box"
    assert not cancel.is_set()
    cancel.set()
    *_, last = running
    assert last[0] == ()
    assert last[4]["value"] == "Hello?"
    assert model.ended


def test_a_page_that_goes_away_ends_its_reply(drawing: Any) -> None:
    model = FakeModel(["w"] * 1000)
    running = drawing.stream_reply(model, (QUESTION,), DEFAULTS, before=(), draft=None)
    _, cancel, *_ = next(running)
    running.close()
    assert cancel.is_set()


LONG = PromptTooLong("the prompt has 9 tokens", tokens=9, context=5, hint="drop-oldest")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LONG, "The prompt has 9 tokens. Shorten the message, or the system message."),
        (GPTQLoaderError("no template", hint="name one"), "No template. Name one."),
        (RuntimeError("out of memory\nat line 3"), "The model failed: out of memory. Shorten the"),
    ],
)
def test_an_error_puts_everything_back(drawing: Any, error: Exception, words: str) -> None:
    model = FakeModel()
    model.error = error
    *_, last = stream(drawing, model)
    conversation, _, problem, _, message, *_ = last
    assert problem.startswith(words)
    assert conversation == ()
    assert message["value"] == "Hello?"


def test_a_setting_out_of_range_is_named(drawing: Any) -> None:
    *_, last = stream(drawing, FakeModel(), ["", 0, *DEFAULTS[2:]])
    assert last[2].startswith("The option max_new_tokens: ")


def test_a_warning_is_told(drawing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(drawing.gr, "Warning", told.append)
    model = FakeModel()
    model.warning = "its oldest 2 messages were left out"
    stream(drawing, model)
    assert told == [model.warning]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a <b>c</b>", "a &lt;b>c&lt;/b>"),
        ("1 < 2 and `<b>`", "1 < 2 and `<b>`"),
        ("```html\n<b>\n```\n<i>", "```html\n<b>\n```\n&lt;i>"),
        ("```html\n<b>", "```html\n<b>"),
        ("", "*(a reply without text)*"),
    ],
)
def test_tags_outside_code_are_shown_and_not_obeyed(drawing: Any, text: str, shown: str) -> None:
    moment = Moment(({"role": "assistant", "content": text},))
    assert drawing.drawn(moment)[3][0]["content"] == shown


def test_the_page_offers_the_cards_system_message(drawing: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        from gptq_loader_extensions.gradio.page import build_page

        plan = gptq.explain(
            CHECKPOINT, device="cpu", plugins=gptq.Plugins(installed=True, environ=ENVIRON)
        )
        model: Any = SimpleNamespace(
            plan=plan,
            config=plan.config,
            context=512,
            template=ChatML(),
            warnings=(),
            card=Card(system="You are kind."),
            explain=plan.explain,
        )
        ids = {getattr(it, "elem_id", None) for it in build_page(model).blocks.values()}
        gc.collect()
    assert {"about", "chat", "message", "send", "stop", "card-system", "seed"} <= ids
