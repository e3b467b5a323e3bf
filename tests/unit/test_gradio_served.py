"""The page's model where it is a server's, with the server's own queue."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from altered import DATA, ONE
from served import OTHER, Brake, running
from waiting import join

from gptq_loader_extensions.gradio.jobs.measuring import measure
from gptq_loader_extensions.gradio.jobs.models import ReplyStart, Stopped
from gptq_loader_extensions.gradio.jobs.reply import raw_prompt
from gptq_loader_extensions.gradio.jobs.server_models import ServerModels
from gptq_loader_extensions.gradio.storage.catalog import Catalog
from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.load_options import LoadOptions

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.generation.generate import Piece

GREEDY = GenerateOptions(temperature=0, max_new_tokens=5)


def pieces(models: ServerModels, cancel: threading.Event) -> list[Piece]:
    events = models.stream(raw_prompt("Hello"), GREEDY, cancel)
    return [event for event in events if not isinstance(event, ReplyStart)]


def test_a_reply_that_ends_does_not_end_another_of_the_same_stop_button(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        models, cancel = ServerModels(server.server), threading.Event()
        assert pieces(models, cancel)[-1].finish == "length"
        assert not cancel.is_set()
        abandoned = models.stream(raw_prompt("Hello"), GREEDY, cancel)
        next(abandoned)
        abandoned.close()  # type: ignore[attr-defined]  # a generator
        assert cancel.is_set()


def test_a_reply_that_is_stopped_before_its_turn_is_no_error(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        models, cancel = ServerModels(server.server), threading.Event()
        cancel.set()
        assert [piece.finish for piece in pieces(models, cancel)] == ["cancelled"]


def test_a_load_that_waits_for_replies_is_stopped(tmp_path: Path) -> None:
    brake = Brake()
    with running(tmp_path, loads=brake) as server:
        models = ServerModels(server.server)
        first: list[Piece] = []
        asking = threading.Thread(target=lambda: first.extend(pieces(models, threading.Event())))
        asking.start()
        brake.wait_for_reply()
        cancel = threading.Event()
        entry = Catalog(models_dir=DATA, cache=False).find(OTHER)
        threading.Timer(0.5, cancel.set).start()
        with pytest.raises(Stopped):
            models.load(entry, LoadOptions(device="cpu"), lambda _: None, cancel=cancel)
        brake.let_go()
        join(asking)
        assert first[-1].finish == "length", "the reply was not disturbed"
        assert models.loaded is not None
        assert models.loaded.name == ONE


def test_it_is_measured_between_the_replies(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        models = ServerModels(server.server)
        written: list[Piece] = []
        measured = measure(
            models,
            None,
            threading.Event(),
            lambda step: written.extend(
                pieces(models, threading.Event()) if step.done == 1 else []
            ),
        )
        assert written[-1].finish == "length"
        assert measured.name == ONE
        assert measured.perplexity > 1
