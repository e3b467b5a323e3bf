"""The chat page without a browser: the reply's logic, the address, what it says when it cannot."""

from __future__ import annotations

import gc
import json
import socket
import sys
import threading
import warnings
from functools import partial
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import gptq_loader_plugin as gptq
from gptq_loader_extensions.gradio import GradioHost, gptq_hosts
from gptq_loader_extensions.gradio.jobs.conversation import (
    ChatState,
    Message,
    prompt_messages,
    undo_last,
)
from gptq_loader_extensions.gradio.jobs.models import Loaded, ReplyStart
from gptq_loader_extensions.gradio.jobs.reply import chat_prompt, write_reply
from gptq_loader_extensions.gradio.tabs.header import entry_name, header_html, title
from gptq_loader_extensions.gradio.versions import known, to_pairs
from gptq_loader_plugin.chat.templates import ChatML
from gptq_loader_plugin.chat.thinking import ThinkingMarks
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid, PluginError, PromptTooLong
from gptq_loader_plugin.generation.generate import Piece
from gptq_loader_plugin.generation.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gptq_loader_extensions.gradio.jobs.models import EncodedPrompt

ENVIRON = {"GPTQ_LOADER_PLUGINS": "core,kernel-dense,kernel-reference"}
CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints" / "gptq-4bit-32g-act-sym"
OPTIONS = GenerateOptions()
# The settings as the page hands them over.
DEFAULTS = ["", 512, 0.7, 0.95, 40, 0.0, 1.0, None, 0, 0, "", "Automatic", None]
KEY = "0123456789abcdef"
QUESTION = Message(role="user", content="Hello?")


class FakeModels:
    """Generate one word after the other, or raise."""

    loaded = None

    def __init__(self, words: Sequence[str] = ("One", " two"), *, finish: Any = "stop") -> None:
        self.words, self.finish = words, finish
        self.error: Exception | None = None
        self.warning = ""
        self.marks: ThinkingMarks | None = None
        self.messages: list[dict[str, str]] = []
        self.options: GenerateOptions | None = None
        self.ended = False

    def stream(
        self,
        prepare: Callable[[Any], EncodedPrompt],
        options: GenerateOptions,
        cancel: threading.Event,
    ) -> Iterator[ReplyStart | Piece]:
        self.options = options
        if self.error:
            raise self.error
        prompt = prepare(
            SimpleNamespace(
                encode_chat=self._encode,
                template=ChatML(),
                tokenizer=None,
                adapter=None,
                adapters=None,
            )
        )
        assert prompt.stop == ChatML().stop
        yield ReplyStart(len(prompt.ids), 512, prompt.warning, self.marks)
        try:
            for i, word in enumerate(self.words):
                if cancel.is_set():
                    yield Piece("", i, "cancelled")
                    return
                yield Piece(word, i + 1)
            yield Piece("", len(self.words), self.finish)
        finally:
            self.ended = True

    def _encode(self, messages: Any, *, when_too_long: str, template: Any) -> tuple[list[int], str]:
        assert when_too_long == "drop-oldest"
        assert template == ChatML()
        self.messages = list(messages)
        return [1, 2, 3], self.warning


class Clock:
    """Half a second passes between two looks at it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def answer(
    model: Any,
    *,
    system: str = "",
    options: GenerateOptions = OPTIONS,
    cancel: threading.Event | None = None,
    clock: Callable[[], float] | None = None,
) -> Iterator[ChatState]:
    """Answer the question."""
    return write_reply(
        model,
        chat_prompt(prompt_messages([QUESTION], system)),
        options,
        messages=(QUESTION,),
        cancel=cancel or threading.Event(),
        clock=clock or Clock(),
    )


def test_a_reply_grows_to_its_end() -> None:
    first, turn, *growing, last = answer(FakeModels(["One", " two", " three"]))
    assert first == turn == ChatState((QUESTION,), "Reading the prompt …", running=True)
    assert (first.reply, last.messages[0]) == ("", QUESTION)
    assert [state.reply for state in growing] == ["One", "One two", "One two three"]
    assert all(state.running for state in growing)
    assert not last.running
    assert last.reply == "One two three"
    assert last.status == (
        "3 tokens, 1.3 a second; the first after 0.50 s; 6 of 512 of the context used"
    )


def test_a_fast_reply_is_not_redrawn_for_every_token() -> None:
    model = FakeModels(["w"] * 100)
    times = iter(i * 0.001 for i in range(1000))
    states = list(answer(model, clock=lambda: next(times)))
    assert len(states) <= 6
    assert states[-1].reply == "w" * 100


def test_a_cancelled_reply_keeps_its_text() -> None:
    cancel = threading.Event()
    running = answer(FakeModels(["One", " two", " three"]), cancel=cancel)
    for _ in range(3):
        next(running)
    cancel.set()
    (last,) = running
    assert last.reply == "One"
    assert last.status.endswith("; stopped")
    assert not last.running


def test_a_reply_cancelled_before_its_first_word_gives_the_question_back() -> None:
    cancel = threading.Event()
    cancel.set()
    *_, last = answer(FakeModels(), cancel=cancel)
    assert last == ChatState((), "Stopped.", draft="Hello?")


@pytest.mark.parametrize(
    ("limit", "words"),
    [(2, "cut off at 2 new tokens (Max new tokens)"), (512, "cut off where the context is full")],
)
def test_a_reply_that_was_cut_off_says_where(limit: int, words: str) -> None:
    options = GenerateOptions(max_new_tokens=limit)
    *_, last = answer(FakeModels(finish="length"), options=options)
    assert last.status.endswith(words)


def test_a_system_message_comes_first_and_is_not_shown() -> None:
    model = FakeModels()
    *_, last = answer(model, system="Be brief.")
    assert model.messages == prompt_messages([QUESTION], "Be brief.")
    assert model.messages[0] == {"role": "system", "content": "Be brief."}
    assert last.messages[0] == QUESTION
    list(answer(model, system="  "))
    assert model.messages == [{"role": "user", "content": "Hello?"}]


def test_undo_removes_a_question_and_its_reply() -> None:
    reply, second = Message(role="assistant", content="a"), Message(role="user", content="b")
    assert undo_last([QUESTION, reply, second]) == ((QUESTION, reply), second)
    assert undo_last([QUESTION, reply]) == ((), QUESTION)
    assert undo_last([]) == ((), None)


MARKS = ThinkingMarks("<think>", "</think>", opened=True)


def test_a_thought_is_apart_with_its_time() -> None:
    model = FakeModels(["so", "\n</think>", "\n\n", "Ten"])
    model.marks = MARKS
    states = list(answer(model))
    thoughts = [state.messages[-1].thought for state in states[2:]]
    assert thoughts[0] == "so"
    last = states[-1].messages[-1]
    assert (last.thought, last.content) == ("so", "Ten")
    assert last.seconds == 0.5, "from its first word to its end"
    assert prompt_messages([last])[0] == {
        "role": "assistant",
        "content": "Ten",
        "reasoning_content": "so",
    }


def test_another_version_keeps_the_first() -> None:
    first = Message(role="assistant", content="One", thought="hm", seconds=2.0)
    *_, last = write_reply(
        FakeModels(),  # type: ignore[arg-type]  # as much of it as a reply needs
        chat_prompt(prompt_messages([QUESTION])),
        OPTIONS,
        messages=(QUESTION,),
        earlier=first,
        cancel=threading.Event(),
        clock=Clock(),
    )
    reply = last.messages[-1]
    assert (reply.content, reply.thought, reply.shown) == ("One two", "", 1)
    assert [version.content for version in reply.versions] == ["One", "One two"]
    again = reply.show(0)
    assert (again.content, again.thought, again.seconds) == ("One", "hm", 2.0)
    assert again.show(9) == reply


def test_a_reply_without_a_word_leaves_the_earlier_one() -> None:
    cancel = threading.Event()
    cancel.set()
    first = Message(role="assistant", content="One")
    for continues in (False, True):
        *_, last = write_reply(
            FakeModels(),  # type: ignore[arg-type]  # as much of it as a reply needs
            chat_prompt(prompt_messages([QUESTION])),
            OPTIONS,
            messages=(QUESTION,),
            earlier=first,
            continues=continues,
            cancel=cancel,
            clock=Clock(),
        )
        assert last == ChatState((QUESTION, first), "Stopped.")


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
    html = header_html(Loaded(entry_name(model), model))
    assert entry_name(model) == CHECKPOINT.name
    assert "<script>" not in html
    text = unescape(html)
    for words in (plan.headline(), plan.explain(), "context 4,096", "act-order", "chatml"):
        assert words in text
    assert text.count("a label lies") == 1


def test_a_hub_reference_is_its_own_name() -> None:
    plan = SimpleNamespace(reference="owner/repo:branch", path=Path("/cache/1a2b"))
    assert entry_name(SimpleNamespace(plan=plan)) == "owner/repo:branch"  # type: ignore[arg-type]


def test_the_demo_goes_by_its_real_name() -> None:
    model: Any = SimpleNamespace(
        plan=SimpleNamespace(reference="demo", path=Path("/cache/SmolLM2-GPTQ-4bit-32g-d7c966f4"))
    )
    assert entry_name(model) == "demo"
    assert title(Loaded("demo", model)) == "SmolLM2"
    assert title(None) == "No model is loaded"
    assert "Choose one" in header_html(None)


def test_options_that_a_version_does_not_know_are_left_out() -> None:
    def launch(self: object, *, port: int) -> None: ...

    assert known(launch, port=1, ssr_mode=False) == {"port": 1}
    talk = [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    assert to_pairs(talk) == [("Hello?", "a"), ("b", None)]


# The host


def test_the_host_is_offered_by_name() -> None:
    (host,) = gptq_hosts()
    assert host.name == "gradio"
    assert isinstance(host, gptq.Host)


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OptionInvalid, match=f"^port {port} is already in use") as caught:
            GradioHost().install(model=FakeModels(), port=port, open_browser=False)
    assert "--port" in caught.value.hint


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"port": 70_000}, "70000 is not a valid port"),
        ({"host": "192.0.2.1"}, "192.0.2.1 is not an address of this machine"),
        ({"colour": "red"}, "unknown options of the page: colour"),
    ],
)
def test_an_address_that_cannot_be_is_a_clear_error(where: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionInvalid, match=words):
        GradioHost().install(model=FakeModels(), open_browser=False, **where)


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(PluginError, match="needs gradio") as caught:
        GradioHost().install(model=FakeModels(), open_browser=False)
    assert caught.value.hint == "pip install 'gptq-loader-plugin[gradio]'"


# What is shown


@pytest.fixture(scope="module")
def updates() -> Iterator[Any]:
    """The module that shows the chat; importing gradio leaves event loops open behind it."""
    pytest.importorskip("gradio")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        from gptq_loader_extensions.gradio.tabs import chat_updates as updates

        gc.collect()
    return updates


def stream(updates: Any, model: FakeModels, values: Sequence[Any] = DEFAULTS) -> list[Any]:
    return list(updates.stream_updates(model, request(updates), values))


def request(updates: Any) -> Any:
    return updates.ReplyRequest((QUESTION,), before=(), key=KEY, draft="Hello?")


def test_the_settings_reach_the_model(updates: Any) -> None:
    model = FakeModels()
    stream(
        updates, model, ["Be brief.", 7, 0, 0.5, 3, 0.1, 1.2, 42, 0, 0, "###\n\\nQ:", "Off", None]
    )
    assert model.options == GenerateOptions(
        max_new_tokens=7,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.2,
        seed=42,
        stop=("###", "\nQ:"),
    )
    assert model.messages[0]["content"] == "Be brief."


def test_the_defaults_are_those_of_the_options(updates: Any) -> None:
    model = FakeModels()
    stream(updates, model)
    assert model.options == OPTIONS


def test_a_reply_hands_out_what_stops_it(updates: Any) -> None:
    model = FakeModels(["w"] * 1000)
    running = updates.stream_updates(model, request(updates), DEFAULTS)
    first = next(running)
    assert (first["conversation"], first["problem"]) == ((QUESTION,), "")
    assert first["message"]["value"] == "", "what was sent leaves the message box"
    assert "Hello?" in first["kept"], "the browser keeps a question before it is answered"
    assert not first["new"]["interactive"]
    first["cancel"].set()
    *_, last = running
    assert last["conversation"] == ()
    assert last["message"]["value"] == "Hello?"
    assert last["new"]["interactive"]
    assert model.ended


def test_the_buttons_are_not_redrawn_while_a_reply_grows(
    updates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "write_reply", partial(write_reply, clock=Clock()))
    words = ["One", " two", " three", " four"]
    began, again, *growing, last = stream(updates, FakeModels(words))
    assert set(began) - set(again) <= {"message"}, "what is named once may be lost"
    assert growing
    for grown in growing:
        assert set(grown) == {"conversation", "cancel", "problem", "chat", "status"}
    assert '{"content":"One two three four","role":"assistant"}' in last["kept"]


def test_the_browser_keeps_a_reply_while_it_grows(updates: Any) -> None:
    clock = iter(range(1000))
    states = list(
        updates.stream_updates(
            FakeModels(["One", " two", " three"]),
            request(updates),
            DEFAULTS,
            clock=lambda: float(next(clock)) * 2,
        )
    )
    *_, last = states
    left = [state["kept"] for state in states[2:-1] if "kept" in state]
    assert all('"ended":"left"' in kept for kept in left)
    assert '"ended"' not in last["kept"]


def test_a_page_that_goes_away_ends_its_reply(updates: Any) -> None:
    model = FakeModels(["w"] * 1000)
    running = updates.stream_updates(model, request(updates), DEFAULTS)
    cancel = next(running)["cancel"]
    running.close()
    assert cancel.is_set()


LONG = PromptTooLong("the prompt has 9 tokens", tokens=9, context=5, hint="drop-oldest")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LONG, "The prompt has 9 tokens. Shorten the message, or the system message."),
        (GPTQLoaderError("no template", hint="name one"), "No template. Name one."),
        (RuntimeError("out of memory\nat line 3"), "The model failed: out of memory. Shorten the"),
        (MemoryError(), "Out of memory. Choose a smaller model"),
    ],
)
def test_an_error_puts_everything_back(updates: Any, error: Exception, words: str) -> None:
    model = FakeModels()
    model.error = error
    *_, last = stream(updates, model)
    assert last["problem"].startswith(words)
    assert last["conversation"] == ()
    assert last["message"]["value"] == "Hello?"


def test_a_setting_out_of_range_is_named(updates: Any) -> None:
    *_, last = stream(updates, FakeModels(), ["", 0, *DEFAULTS[2:]])
    assert last["problem"].startswith("The option max_new_tokens: ")


def test_a_warning_is_shown(updates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(updates.gr, "Warning", warnings.append)
    model = FakeModels()
    model.warning = "its oldest 2 messages were left out"
    stream(updates, model)
    assert warnings == [model.warning]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a <b>c</b>", "a &lt;b>c&lt;/b>"),
        ("1 < 2 and `<b>`", "1 < 2 and `<b>`"),
        ("```html\n<b>\n```\n<i>", "```html\n<b>\n```\n&lt;i>"),
        ("```html\n<b>", "```html\n<b>"),
        ("```C++\nint x;\n```", "```cpp\nint x;\n```"),
        ("written &lt;b and `&lt;b`", "written &amp;lt;b and `&lt;b`"),
    ],
)
def test_tags_outside_code_are_shown_and_not_obeyed(updates: Any, text: str, shown: str) -> None:
    state = ChatState((Message(role="assistant", content=text),))
    assert updates.render(state)["chat"][0]["content"] == shown
    assert json.loads(updates.render(state, key=KEY)["kept"])["messages"][0]["content"] == text


def test_a_reply_without_text_says_so(updates: Any) -> None:
    state = ChatState((Message(role="assistant"),))
    assert updates.render(state)["chat"][0]["content"] == "*(a reply without text)*"


def test_a_thought_is_folded_and_cannot_break_out(updates: Any) -> None:
    thought = "</details>\n```py\nx"
    message = Message(role="assistant", content="Ten", thought=thought, seconds=72.4)
    (shown,) = updates.render(ChatState((message,)))["chat"]
    assert shown["content"] == (
        "<details><summary>Thought for 1 min 12 s</summary>\n\n"
        "&lt;/details>\n```python\nx\n```\n\n</details>\n\nTen"
    )
    growing = ChatState((Message(role="assistant", thought="so"),), running=True)
    (shown,) = updates.render(growing)["chat"]
    assert shown["content"].startswith("<details open><summary>Thinking …</summary>")
