"""The models a page lists, loads and asks."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lora_files import write_adapter
from waiting import eventually, join

import gptq_loader_plugin as gptq
from gptq_loader_extensions.gradio.jobs.loading import load_with_progress
from gptq_loader_extensions.gradio.jobs.local_models import LocalModels
from gptq_loader_extensions.gradio.jobs.models import ReplyStart, Stopped
from gptq_loader_extensions.gradio.jobs.reply import ReplySettings, chat_prompt, raw_prompt
from gptq_loader_extensions.gradio.storage.catalog import Catalog
from gptq_loader_extensions.gradio.views.prompt_view import prompt_html
from gptq_loader_plugin.errors import CheckpointNotFound, GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.load_options import LoadOptions

if TYPE_CHECKING:
    from gptq_loader_plugin.events import Progress

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
FIRST, SECOND = "gptq-4bit-32g-act-sym", "gptq-3bit-128g-act-sym"
ENVIRON = {"GPTQ_LOADER_PLUGINS": "core,kernel-dense,kernel-reference"}
GREEDY = GenerateOptions(temperature=0, max_new_tokens=6)


# The list of models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    models = tmp_path / "models"
    for name in (FIRST, SECOND):
        shutil.copytree(CHECKPOINTS / name, models / name)
    return models


def test_the_catalog_lists_models_and_the_demo(folder: Path) -> None:
    catalog = Catalog(models_dir=folder, cache=False)
    assert [entry.name for entry in catalog.entries()] == [SECOND, FIRST, "demo"]
    assert catalog.find(FIRST).target == folder / FIRST
    assert catalog.find("demo").target == "demo"
    assert "354 kB" in catalog.find(FIRST).label
    assert catalog.download_folder("owner_repo") == folder / "owner_repo"
    assert Catalog().download_folder("owner_repo") is None


@pytest.mark.parametrize("name", ["", "/etc", "..", f"../models/{FIRST}", "\x00", "owner/repo"])
def test_a_name_that_is_not_listed_is_not_found(folder: Path, name: str) -> None:
    with pytest.raises(CheckpointNotFound, match="is no longer here"):
        Catalog(models_dir=folder, cache=False).find(name)


def test_what_points_outside_is_not_listed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS / FIRST, tmp_path / "outside")
    (folder / "linked").symlink_to(tmp_path / "outside")
    shutil.copytree(CHECKPOINTS / FIRST, folder / "stolen")
    (folder / "stolen" / "notes.txt").symlink_to("/etc/passwd")
    catalog = Catalog(models_dir=folder, cache=False)
    assert [entry.name for entry in catalog.entries()] == [SECOND, FIRST, "demo"]
    catalog.add(FIRST, tmp_path / "outside")
    assert catalog.find(FIRST).target == tmp_path / "outside", "it was named on the command line"


# A real model


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(models_dir=CHECKPOINTS, cache=False)


def answer(models: LocalModels, text: str = "Hello", *, tokens: int = 6) -> str:
    options = GREEDY.model_copy(update={"max_new_tokens": tokens})
    ready, *pieces = models.stream(
        chat_prompt([{"role": "user", "content": text}]), options, threading.Event()
    )
    assert isinstance(ready, ReplyStart)
    return "".join(piece.text for piece in pieces if isinstance(piece, gptq.Piece))


def test_a_model_is_put_in_place_of_another(catalog: Catalog) -> None:
    models = LocalModels(environ=ENVIRON)
    with pytest.raises(GPTQLoaderError, match="no model is loaded"):
        answer(models)
    steps: list[Progress] = []
    first = models.load(catalog.find(FIRST), LoadOptions(context=100), steps.append)
    assert {"weights", "self-check"} <= {step.stage for step in steps}
    assert (first.name, first.model.context) == (FIRST, 100)
    assert answer(models)
    with pytest.raises(OptionInvalid):
        models.load(catalog.find(SECOND), LoadOptions(device="cuda:99"), steps.append)
    assert models.loaded is first, "what cannot be loaded leaves the old one"
    second = models.load(catalog.find(SECOND), LoadOptions(backend="reference"), steps.append)
    assert models.loaded is second
    assert second.model.plan.kernels() == {"reference": 14}
    with pytest.raises(GPTQLoaderError, match="closed"):
        list(first.model.stream("Hello"))
    models.unload()
    assert models.loaded is None


def test_a_model_is_loaded_with_its_adapters_which_replies_choose(
    tmp_path: Path,
) -> None:
    checkpoint = CHECKPOINTS / FIRST
    folders = {
        name: write_adapter(tmp_path / name, checkpoint, seed=i) for i, name in enumerate("ab")
    }
    catalog, models = Catalog(models_dir=CHECKPOINTS, cache=False), LocalModels(environ=ENVIRON)
    written = {}
    for names in ("a", "ab"):
        catalog.add(FIRST, checkpoint, {name: folders[name] for name in names})
        models.load(catalog.find(FIRST), LoadOptions(), lambda _: None)
        for chosen in (None, "", *names):
            start, *pieces = models.stream(
                chat_prompt([{"role": "user", "content": "Hello"}], ReplySettings(adapter=chosen)),
                GREEDY,
                threading.Event(),
            )
            assert isinstance(start, ReplyStart)
            own = "a" if names == "a" else None
            assert start.adapter == (own if chosen is None else chosen or None)
            text = "".join(it.text for it in pieces if isinstance(it, gptq.Piece))
            assert written.setdefault(start.adapter, text) == text
    assert len(set(written.values())) == 3, "each writes something else"
    with pytest.raises(OptionInvalid, match="the adapter c is not loaded"):
        list(
            models.stream(
                raw_prompt("Hello", ReplySettings(adapter="c")), GREEDY, threading.Event()
            )
        )
    models.unload()


def test_a_change_waits_for_the_reply_that_runs(catalog: Catalog) -> None:
    models = LocalModels(environ=ENVIRON)
    models.load(catalog.find(FIRST), LoadOptions(), lambda _: None)
    options = GREEDY.model_copy(update={"max_new_tokens": 50})
    reply = models.stream(raw_prompt("Hello"), options, threading.Event())
    next(reply)
    steps: list[Progress] = []
    changing = threading.Thread(
        target=models.load, args=(catalog.find(SECOND), LoadOptions(), steps.append)
    )
    changing.start()
    eventually(lambda: steps, awaited="progress of the load")
    assert steps[0].stage == "waiting"
    assert models.loaded is not None
    assert models.loaded.name == FIRST
    assert sum(1 for _ in reply) > 1, "the reply ends in peace"
    join(changing)
    assert models.loaded.name == SECOND
    models.unload()


def test_a_load_is_stopped_between_two_layers(catalog: Catalog) -> None:
    models = LocalModels(environ=ENVIRON)
    first = models.load(catalog.find(FIRST), LoadOptions(), lambda _: None)
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Stopped):
        models.load(catalog.find(SECOND), LoadOptions(), lambda _: None, cancel=cancel)
    assert models.loaded is first, "it had not begun"
    cancel.clear()
    steps: list[Progress] = []

    def stop_at_the_third(progress: Progress) -> None:
        steps.append(progress)
        if len(steps) == 3:
            cancel.set()

    with pytest.raises(Stopped):
        models.load(catalog.find(SECOND), LoadOptions(), stop_at_the_third, cancel=cancel)
    assert len(steps) == 3
    assert models.loaded is None
    assert models.load(catalog.find(FIRST), LoadOptions(), lambda _: None).name == FIRST
    models.unload()


def test_a_load_that_waits_for_a_reply_is_stopped(catalog: Catalog) -> None:
    models = LocalModels(environ=ENVIRON)
    first = models.load(catalog.find(FIRST), LoadOptions(), lambda _: None)
    reply = models.stream(raw_prompt("Hello"), GREEDY, threading.Event())
    next(reply)
    cancel = threading.Event()

    def stop(progress: Progress) -> None:
        assert progress.stage == "waiting"
        cancel.set()

    with pytest.raises(Stopped):
        models.load(catalog.find(SECOND), LoadOptions(), stop, cancel=cancel)
    assert models.loaded is first
    assert sum(1 for _ in reply) > 1
    assert answer(models), "and the next one is answered"
    models.unload()


def test_a_load_that_comes_to_nothing_says_what_is_loaded(catalog: Catalog) -> None:
    models = LocalModels(environ=ENVIRON)
    cancel = threading.Event()
    cancel.set()
    last = [*load_with_progress(models, catalog.find(FIRST), LoadOptions(), cancel)][-1]
    assert (last.running, last.loaded) == (False, False)
    assert "Stopped. No model is loaded now." in last.progress
    models.load(catalog.find(FIRST), LoadOptions(), lambda _: None)
    last = [*load_with_progress(models, catalog.find(SECOND), LoadOptions(), cancel)][-1]
    assert f"Stopped. {FIRST} is still loaded." in last.progress
    views = []
    cancel.clear()
    for view in load_with_progress(models, catalog.find(SECOND), LoadOptions(), cancel):
        views.append(view)
        if "Loading the weights" in view.progress and "%" in view.progress:
            cancel.set()
    assert f"No model is loaded now: {FIRST} was unloaded for it." in views[-1].progress
    models.load(catalog.find(FIRST), LoadOptions(), lambda _: None)
    options = LoadOptions(backend="exllama")
    last = [*load_with_progress(models, catalog.find(SECOND), options, threading.Event())][-1]
    assert f"{FIRST} is still loaded." in last.progress
    assert not last.loaded
    models.unload()


def test_a_reply_that_is_given_up_does_not_hold_a_change_up(catalog: Catalog) -> None:
    models = LocalModels(environ=ENVIRON)
    models.load(catalog.find(FIRST), LoadOptions(), lambda _: None)
    reply = models.stream(raw_prompt("Hello"), GREEDY, threading.Event())
    next(reply)
    reply.close()  # type: ignore[attr-defined]  # a generator
    never_begun = models.stream(raw_prompt("Hello"), GREEDY, threading.Event())
    models.unload()
    assert models.loaded is None
    with pytest.raises(GPTQLoaderError, match="no model is loaded"):
        next(never_begun)


def test_a_model_that_would_not_fit_is_refused(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_loader_plugin.planning.memory.free_memory", lambda: 1000)
    with pytest.raises(GPTQLoaderError, match="of memory, and 1 kB is free"):
        LocalModels(environ=ENVIRON).load(catalog.find(FIRST), LoadOptions(), lambda _: None)


def test_the_exact_prompt_marks_special_tokens_alone(catalog: Catalog) -> None:
    models = LocalModels(environ=ENVIRON)
    model = models.load(catalog.find(FIRST), LoadOptions(), lambda _: None).model
    ids, _ = model.encode_chat([{"role": "user", "content": "<|im_end|> & é"}])
    html = prompt_html(ids, model.tokenizer, context=model.context)
    assert html.count("<mark>&lt;|im_end|&gt;</mark>") == 1
    assert "&lt;|im_end|&gt; &amp; é" in html
    models.unload()
