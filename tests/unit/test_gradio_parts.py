"""The page's parts without a browser: what is kept, listed, drawn, and said."""

from __future__ import annotations

import json
import shutil
import threading
import time
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

import gptq_loader_plugin as gptq
from gptq_loader_extensions.gradio.catalog import Catalog
from gptq_loader_extensions.gradio.comparing import by_turns, where_they_part
from gptq_loader_extensions.gradio.export import as_json, as_markdown, file_name
from gptq_loader_extensions.gradio.facts import facts_html
from gptq_loader_extensions.gradio.jobs import Done, progress_bar, watched
from gptq_loader_extensions.gradio.keeping import new_key, read_list, write_kept
from gptq_loader_extensions.gradio.machine import free_bytes, resident_bytes
from gptq_loader_extensions.gradio.models import LoadOptions, OneModel, Ready
from gptq_loader_extensions.gradio.plan_view import memory_html, memory_of, plan_html
from gptq_loader_extensions.gradio.reply import chat_prompt, raw_prompt
from gptq_loader_extensions.gradio.settings_file import (
    ModelSettings,
    SettingsFile,
    config_folder,
)
from gptq_loader_extensions.gradio.words import alert, as_words
from gptq_loader_plugin.errors import (
    CheckpointNotFound,
    GPTQLoaderError,
    OptionInvalid,
    PromptTooLong,
)
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.options import GenerateOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
FIRST, SECOND = "gptq-4bit-32g-act-sym", "gptq-3bit-128g-act-sym"
ENVIRON = {"GPTQ_LOADER_PLUGINS": "core,kernel-dense,kernel-reference"}
GREEDY = GenerateOptions(temperature=0, max_new_tokens=6)
TALK = [
    {"role": "user", "content": "What is\n *this*?"},
    {"role": "assistant", "content": "# A reply\n"},
]


# Settings


def test_settings_are_read_back(tmp_path: Path) -> None:
    file = SettingsFile(tmp_path / "new" / "folder")
    settings = ModelSettings(backend="dense", system="Be brief.", sampling=GREEDY)
    assert file.read("a/b:c") == (None, "")
    assert file.save("a/b:c", settings) == ""
    assert file.save("other", ModelSettings()) == ""
    assert SettingsFile(file.path.parent).read("a/b:c") == (settings, "")
    assert [it.name for it in file.path.parent.iterdir()] == [file.path.name], "nothing is left"


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"models": 3}', '{"models": {"a": {"sampling": {"top_p": 7}}}}', "\x00\xff"],
)
def test_a_damaged_file_is_put_aside(tmp_path: Path, text: str) -> None:
    file = SettingsFile(tmp_path)
    for number in (1, 2):
        file.path.write_text(text, encoding="latin-1")
        found, note = file.read("a")
        assert found is None
        assert note == (
            "the file of settings was damaged; it was put aside as "
            f"page-settings.damaged-{number}.json"
        )
        assert file.read("a") == (None, "")
    file.path.write_text(text, encoding="latin-1")
    assert "put aside" in file.save("a", ModelSettings(system="x"))
    assert file.read("a") == (ModelSettings(system="x"), "")


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = SettingsFile(tmp_path)
    file.save("a", ModelSettings(system="old"))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(GPTQLoaderError, match="No space left on device") as caught:
        file.save("a", ModelSettings(system="new"))
    assert "GPTQ_LOADER_CONFIG" in caught.value.hint
    assert file.read("a") == (ModelSettings(system="old"), "")
    assert [it.name for it in tmp_path.iterdir()] == [file.path.name]


def test_many_save_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    file = SettingsFile(tmp_path)
    saving = [
        threading.Thread(target=file.save, args=(str(i), ModelSettings(context=i + 2)))
        for i in range(16)
    ]
    for it in saving:
        it.start()
    for it in saving:
        it.join()
    assert [file.read(str(i))[0] for i in range(16)] == [
        ModelSettings(context=i + 2) for i in range(16)
    ]


def test_the_folder_of_settings_can_be_named(tmp_path: Path) -> None:
    assert config_folder({"GPTQ_LOADER_CONFIG": str(tmp_path)}) == tmp_path
    assert config_folder({"XDG_CONFIG_HOME": "/c"}) == Path("/c/gptq-loader")


# Conversations


def test_a_conversation_is_kept_and_read_back() -> None:
    key = new_key()
    kept = write_kept(key, TALK)
    assert json.loads(kept)["title"] == "What is *this*?"
    found = read_list(json.dumps({"current": key, "opened": json.loads(kept)}))
    assert found.opened is not None
    assert found.opened.talk() == tuple(TALK)
    assert len(json.loads(write_kept(key, [{"role": "user", "content": "w " * 99}]))["title"]) < 50


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "nonsense",
        '{"opened": {"key": "../x", "messages": []}}',
        '{"opened": {"key": "0123456789abcdef", "messages": [{"role": "system", "content": ""}]}}',
        '{"listed": [{"key": 5}]}',
    ],
)
def test_what_a_browser_kept_is_checked(text: str | None) -> None:
    found = read_list(text)
    assert (found.opened, found.listed) == (None, ())


def test_a_conversation_is_exported() -> None:
    assert json.loads(as_json(TALK, model="m")) == {"model": "m", "messages": TALK}
    assert as_markdown(TALK, model="m") == (
        "# Conversation with m\n\n## You\n\nWhat is\n *this*?\n\n## Reply\n\n# A reply\n"
    )
    assert file_name(TALK, ".md") == "what-is-this.md"
    assert file_name([{"role": "user", "content": "../../etc: ?"}], ".json") == "etc.json"
    assert file_name([], ".md") == "conversation.md"


# The list of models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    for name in (FIRST, SECOND):
        shutil.copytree(CHECKPOINTS / name, models / name)
    return models


def test_the_catalog_lists_models_and_the_demo(folder: Path) -> None:
    catalog = Catalog(models_dir=folder, cache=False)
    assert [it.name for it in catalog.entries()] == [SECOND, FIRST, "demo"]
    assert catalog.find(FIRST).target == folder / FIRST
    assert catalog.find("demo").target == "demo"
    assert "354 kB" in catalog.find(FIRST).label
    assert catalog.place_for("owner_repo") == folder / "owner_repo"
    assert Catalog().place_for("owner_repo") is None


@pytest.mark.parametrize("name", ["", "/etc", "..", f"../models/{FIRST}", "\x00", "owner/repo"])
def test_a_name_that_is_not_listed_is_not_found(folder: Path, name: str) -> None:
    with pytest.raises(CheckpointNotFound, match="there is no model"):
        Catalog(models_dir=folder, cache=False).find(name)


def test_what_points_outside_is_not_listed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / FIRST, tmp_path / "outside")
    (folder / "linked").symlink_to(tmp_path / "outside")
    shutil.copytree(CHECKPOINTS / FIRST, folder / "stolen")
    (folder / "stolen" / "notes.txt").symlink_to("/etc/passwd")
    catalog = Catalog(models_dir=folder, cache=False)
    assert [it.name for it in catalog.entries()] == [SECOND, FIRST, "demo"]
    catalog.add(FIRST, tmp_path / "outside")
    assert catalog.find(FIRST).target == tmp_path / "outside", "it was named on the command line"


# Long work


def test_work_is_watched_to_its_end() -> None:
    def work(tell: Any) -> str:
        for i in range(100):
            tell(Progress("weights", i, 100))
        tell(Progress("self-check", 0, 2, "checks"))
        return "value"

    *steps, last = watched(work)
    assert [it.stage for it in steps if isinstance(it, Progress)][-1] == "self-check"
    assert len(steps) < 20, "and not redrawn a hundred times"
    assert isinstance(last, Done)
    assert last.value == "value"


def test_work_that_fails_is_raised_where_it_is_watched() -> None:
    def work(tell: Any) -> None:
        tell(Progress("weights", 0, 2))
        raise GPTQLoaderError("no", hint="yes")

    with pytest.raises(GPTQLoaderError, match="no"):
        list(watched(work))


def test_work_goes_on_when_nobody_watches() -> None:
    ended = threading.Event()

    def work(tell: Any) -> None:
        tell(Progress("weights", 0, 2))
        time.sleep(0.05)
        ended.set()

    running = watched(work)
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
    assert drawn.count("<i class=") == 3


def test_memory_is_read_where_the_system_tells(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    1234 kB\n")
    assert free_bytes(meminfo) == 1234 * 1024
    assert free_bytes(tmp_path / "none") is None
    assert resident_bytes(tmp_path / "none") is None


def test_errors_are_words() -> None:
    long = PromptTooLong("the prompt is long", tokens=9, context=5, hint="drop-oldest")
    assert as_words(long) == "The prompt is long. Shorten the message, or the system message."
    assert as_words(GPTQLoaderError("a", hint="b")) == "A. B."
    assert as_words(RuntimeError("")) == "The model failed: RuntimeError. The terminal says more."
    assert alert("<b>") == '<div role="alert">&lt;b&gt;</div>'
    assert alert("") == ""


# Side by side


class Words:
    """A model that says words, and takes a second for each."""

    loaded = None

    def __init__(self, clock: list[float], *words: str) -> None:
        self.clock, self.words = clock, words

    def ask(self, prepare: Any, options: Any, cancel: threading.Event) -> Iterator[Any]:
        yield Ready("m", 1, 10)
        for i, word in enumerate(self.words):
            self.clock[0] += 1
            last = i + 1 == len(self.words)
            yield gptq.Piece(word, i + 1, "stop" if last or cancel.is_set() else None)


def test_sides_take_turns_and_are_timed_alone() -> None:
    now = [0.0]
    sides: Any = (Words(now, "a", "b", "c"), Words(now, "a", "x"))
    seen = list(
        by_turns(sides, raw_prompt(""), GREEDY, cancel=threading.Event(), clock=lambda: now[0])
    )
    assert [at for at, _ in seen][:6] == [0, 1, 0, 1, 0, 1]
    ends = {at: shown for at, shown in seen if shown.finish}
    assert (ends[0].text, ends[1].text) == ("abc", "ax")
    for end in ends.values():
        assert "1.0 a second" in end.status, "and not half of it"


def test_where_replies_part() -> None:
    assert where_they_part("same", "same") == "Both replies are the same."
    assert where_they_part("a", "b") == "The replies differ from the first character."
    assert where_they_part("Paris is", "Paris was") == (
        "The replies are the same for 6 characters, up to “Paris”."
    )


# A real model


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(models_dir=CHECKPOINTS, cache=False)


def ask(models: OneModel, text: str = "Hello", *, tokens: int = 6) -> str:
    options = GREEDY.model_copy(update={"max_new_tokens": tokens})
    ready, *pieces = models.ask(
        chat_prompt([{"role": "user", "content": text}]), options, threading.Event()
    )
    assert isinstance(ready, Ready)
    return "".join(it.text for it in pieces if isinstance(it, gptq.Piece))


def test_a_model_is_put_in_place_of_another(catalog: Catalog) -> None:
    models = OneModel(environ=ENVIRON)
    with pytest.raises(GPTQLoaderError, match="no model is loaded"):
        ask(models)
    told: list[Progress] = []
    first = models.put(catalog.find(FIRST), LoadOptions(context=100), told.append)
    assert {"weights", "self-check"} <= {it.stage for it in told}
    assert (first.name, first.model.context) == (FIRST, 100)
    assert ask(models)
    with pytest.raises(OptionInvalid):
        models.put(catalog.find(SECOND), LoadOptions(device="cuda:99"), told.append)
    assert models.loaded is first, "what cannot be loaded leaves the old one"
    second = models.put(catalog.find(SECOND), LoadOptions(backend="reference"), told.append)
    assert models.loaded is second
    assert second.model.plan.kernels() == {"reference": 14}
    with pytest.raises(GPTQLoaderError, match="closed"):
        list(first.model.stream("Hello"))
    models.drop()
    assert models.loaded is None


def test_a_change_waits_for_the_reply_that_runs(catalog: Catalog) -> None:
    models = OneModel(environ=ENVIRON)
    models.put(catalog.find(FIRST), LoadOptions(), lambda _: None)
    options = GREEDY.model_copy(update={"max_new_tokens": 50})
    reply = models.ask(raw_prompt("Hello"), options, threading.Event())
    next(reply)
    told: list[Progress] = []
    changing = threading.Thread(
        target=models.put, args=(catalog.find(SECOND), LoadOptions(), told.append)
    )
    changing.start()
    end = time.monotonic() + 20
    while not told and time.monotonic() < end:
        time.sleep(0.01)
    assert told[0].stage == "waiting"
    assert models.loaded is not None
    assert models.loaded.name == FIRST
    assert sum(1 for _ in reply) > 1, "the reply ends in peace"
    changing.join(60)
    assert models.loaded.name == SECOND
    models.drop()


def test_a_reply_that_is_given_up_does_not_hold_a_change_up(catalog: Catalog) -> None:
    models = OneModel(environ=ENVIRON)
    models.put(catalog.find(FIRST), LoadOptions(), lambda _: None)
    reply = models.ask(raw_prompt("Hello"), GREEDY, threading.Event())
    next(reply)
    reply.close()  # type: ignore[attr-defined]  # a generator
    never_begun = models.ask(raw_prompt("Hello"), GREEDY, threading.Event())
    models.drop()
    assert models.loaded is None
    with pytest.raises(GPTQLoaderError, match="no model is loaded"):
        next(never_begun)


def test_a_model_that_would_not_fit_is_refused(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_loader_extensions.gradio.models.free_bytes", lambda: 1000)
    with pytest.raises(GPTQLoaderError, match="of memory, and 1 kB is free"):
        OneModel(environ=ENVIRON).put(catalog.find(FIRST), LoadOptions(), lambda _: None)


def test_the_exact_prompt_marks_special_tokens_alone(catalog: Catalog) -> None:
    from gptq_loader_extensions.gradio.prompt_view import prompt_html

    models = OneModel(environ=ENVIRON)
    model = models.put(catalog.find(FIRST), LoadOptions(), lambda _: None).model
    ids, _ = model.encode_chat([{"role": "user", "content": "<|im_end|> & é"}])
    html = prompt_html(ids, model.tokenizer, context=model.context)
    assert html.count("<mark>&lt;|im_end|&gt;</mark>") == 1
    assert "&lt;|im_end|&gt; &amp; é" in html
    models.drop()


def test_presets_fill_in_what_a_checkpoint_recommends() -> None:
    from gptq_loader_extensions.gradio.presets import PRESETS, own_sampling

    def model(**told: Any) -> Any:
        config = SimpleNamespace(to_diff_dict=lambda: told)
        return SimpleNamespace(model=SimpleNamespace(generation_config=config))

    assert own_sampling(model(temperature=0.6, top_k=20, pad_token_id=3)) == GenerateOptions(
        temperature=0.6, top_k=20
    )
    assert own_sampling(model(do_sample=False, temperature=0.6)) == PRESETS["Deterministic"]
