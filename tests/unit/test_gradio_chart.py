"""The chart of what was measured, and the measuring, without a browser."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from html import unescape
from pathlib import Path

import altered
import pytest

import gptq_loader_plugin as gptq
from gptq_loader_extensions.gradio.jobs.local_models import LocalModels
from gptq_loader_extensions.gradio.jobs.measuring import measure, measure_both, named_text
from gptq_loader_extensions.gradio.jobs.models import Stopped
from gptq_loader_extensions.gradio.storage.catalog import Catalog
from gptq_loader_extensions.gradio.views.chart import chart_html
from gptq_loader_extensions.gradio.views.comparison_view import comparison_html
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.measure.compare import compare_checkpoints
from gptq_loader_plugin.measure.perplexity import measure_perplexity, sample_text
from gptq_loader_plugin.measure.results import Measured, MeasuredText

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
ENVIRON = {"GPTQ_LOADER_PLUGINS": "core,kernel-dense,kernel-reference"}
FIRST, SECOND = "gptq-4bit-32g-act-sym", "gptq-3bit-128g-act-sym"
TEXT = MeasuredText(name="Sample <text>", digest="00", windows=6, window_tokens=256)


def figure(name: str, bits: int, group: int, size: int, perplexity: float) -> Measured:
    return Measured(
        name=name,
        path=f"/{name}",
        bits=bits,
        group_size=group,
        desc_act=True,
        size_bytes=size,
        text=TEXT,
        perplexity=perplexity,
        kernels=("cpu",),
    )


# The six branches as they were measured on SmolLM2-135M.
SIX = [
    figure("main", 4, -1, 111_000_000, 47.7),
    figure("4bit-32g", 4, 32, 119_000_000, 36.1),
    figure("4bit-64g", 4, 64, 115_000_000, 39.3),
    figure("4bit-128g", 4, 128, 113_000_000, 41.6),
    figure("3bit--1g", 3, -1, 98_000_000, 94.6),
    figure("3bit-128g", 3, 128, 99_000_000, 69.1),
]


def test_nothing_measured_says_what_to_do() -> None:
    html = chart_html([])
    assert "<svg" not in html
    assert "Nothing is measured yet" in html
    assert "gptq-loader perplexity" in html


def test_the_picture_and_the_table_say_the_same() -> None:
    html = chart_html(SIX)
    rows = re.findall(r"<th scope='row'>([^<]+)</th><td>([\d.]+)</td><td>([^<]+)</td>", html)
    assert rows[0] == ("4bit-32g", "36.100", "best")
    assert rows[-1] == ("3bit--1g", "94.600", "+162.0%")
    assert [float(row[1]) for row in rows] == sorted(figure.perplexity for figure in SIX)
    marks = re.findall(r"<svg class='mark bits-(\d)' x='([\d.]+)%' y='([\d.]+)%'", html)
    assert sorted(int(bits) for bits, _, _ in marks) == [3, 3, 4, 4, 4, 4]
    assert all(0 < float(x) < 100 and 0 < float(y) < 100 for _, x, y in marks)
    by_size = sorted((float(x), float(y)) for _, x, y in marks)
    assert [y for _, y in by_size] == sorted(y for _, y in by_size), "down, as they get larger"
    summary = unescape(re.findall(r"aria-label='([^']+)'", html)[0])
    assert summary.startswith("4bit-32g predicts best: 36.10 at 119 MB. The smallest is 3bit--1g")
    assert "Measured on Sample &lt;text&gt;, 6 windows of 256 tokens." in html
    assert html.count("class='front'") == 5, "each is the best at its size"


def test_what_another_beats_in_both_is_not_on_the_line() -> None:
    html = chart_html([*SIX[:2], figure("worse", 8, 32, 118_000_000, 99.0)])
    assert html.count("class='front'") == 1


def test_every_label_of_six_is_shown_and_none_covers_another() -> None:
    html = chart_html(SIX)
    labels = re.findall(r"<text class='(\w*)' ([^>]*)>([^<]+)</text>", html)
    assert sorted(text for _, _, text in labels) == [
        "3-bit 128g",
        "3-bit no groups",
        "4-bit 128g",
        "4-bit 32g",
        "4-bit 64g",
        "4-bit no groups",
    ]
    assert not [kind for kind, _, _ in labels if kind], "also on a phone"


def test_marks_in_one_place_hide_labels_rather_than_cover_them() -> None:
    crowd = [figure(f"model-{i}", 4, 32, 100, 10.0 + i / 1e6) for i in range(9)]
    html = chart_html(crowd)
    assert len(re.findall("class='mark", html)) == 9
    assert "class='hidden'" in html
    assert "model-8" in html, "its row is there"


@pytest.mark.parametrize("perplexity", [1.0, 1e-3, 1e9])
def test_one_figure_is_drawn(perplexity: float) -> None:
    html = chart_html([figure("a<b>'\"", 5, 32, 0, perplexity)])
    assert "NaN" not in html
    assert "<b>'" not in html
    assert len(re.findall("class='mark bits-5'", html)) == 1


# Measuring


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog(models_dir=CHECKPOINTS, cache=False)


def test_a_text_has_a_name() -> None:
    assert named_text(None) == ("Sample text", sample_text())
    assert named_text("One\n two") == ("“One two”", "One\n two")
    assert len(named_text("word " * 99)[0]) <= 42


def test_the_model_is_measured_as_the_command_does(catalog: Catalog) -> None:
    models = LocalModels(environ=ENVIRON)
    with pytest.raises(GPTQLoaderError, match="no model is loaded"):
        measure(models, None, threading.Event(), lambda _: None)
    model = models.load(catalog.find(FIRST), LoadOptions(context=128), lambda _: None).model
    steps: list[Progress] = []
    measured = measure(models, None, threading.Event(), steps.append)
    whole = measure_perplexity(model, sample_text(), windows=20, window_tokens=128)
    assert measured.perplexity == pytest.approx(whole.perplexity)
    assert (measured.name, measured.text.windows) == (FIRST, whole.windows)
    assert measured.text.window_tokens == 128
    assert [step.done for step in steps] == [*range(1, whole.windows + 1)]
    assert steps[-1].detail == f"{FIRST}: {measured.perplexity:.2f} so far"
    with pytest.raises(GPTQLoaderError, match="fewer than a window") as caught:
        measure(models, "Too short.", threading.Event(), steps.append)
    assert caught.value.hint == "paste a longer text"
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Stopped):
        measure(models, None, cancel, steps.append)
    models.unload()


def test_a_model_that_is_changed_meanwhile_is_no_figure(catalog: Catalog) -> None:
    models = LocalModels(environ=ENVIRON)
    models.load(catalog.find(FIRST), LoadOptions(), lambda _: None)

    def exchange(_: Progress) -> None:
        models.load(catalog.find(SECOND), LoadOptions(), lambda _: None)

    with pytest.raises(GPTQLoaderError, match="another model was loaded"):
        measure(models, None, threading.Event(), exchange)
    models.unload()


# Two models


def two_models(catalog: Catalog, second: str = SECOND) -> list[LocalModels]:
    sides = [LocalModels(environ=ENVIRON), LocalModels(environ=ENVIRON)]
    for side, name in zip(sides, (FIRST, second), strict=True):
        side.load(catalog.find(name), LoadOptions(context=128), lambda _: None)
    return sides


def test_two_models_are_compared_as_the_command_does(catalog: Catalog) -> None:
    empty = [LocalModels(environ=ENVIRON), LocalModels(environ=ENVIRON)]
    with pytest.raises(GPTQLoaderError, match="no model is loaded"):
        measure_both(empty, None, threading.Event(), lambda _: None)
    sides, steps = two_models(catalog), list[Progress]()
    with pytest.raises(GPTQLoaderError, match="there is no second model"):
        measure_both([sides[0], empty[1]], None, threading.Event(), steps.append)
    compared = measure_both(sides, None, threading.Event(), steps.append)
    expected = compare_checkpoints(
        [str(catalog.find(name).target) for name in (FIRST, SECOND)], sample_text(),
        text_name="Sample text", options=LoadOptions(context=128),
        plugins=gptq.Plugins(installed=True, environ=ENVIRON), windows=20, window_tokens=128,
        speed=False,
    )  # fmt: skip
    for own, other in zip(compared.models, expected.models, strict=True):
        assert (own.prompt_rate or 0) > 0
        assert own.divergence == other.divergence
        assert replace(own, name="", prompt_rate=None, reply_rate=None) == replace(other, name="")
    assert [it.name for it in compared.models] == [FIRST, SECOND]
    assert [it.name for it in compared.measured] == [FIRST, SECOND]
    assert {step.stage for step in steps} == {"compare", "speed"}
    html = comparison_html(compared)
    assert html.count("class='bar ") == 4
    assert f"{compared.models[1].perplexity:.3f}" in html
    for side in sides:
        side.unload()


def test_a_comparison_is_stopped_and_says_what_is_wrong(catalog: Catalog, tmp_path: Path) -> None:
    sides, cancel = two_models(catalog), threading.Event()
    with pytest.raises(GPTQLoaderError, match="fewer than a window") as caught:
        measure_both(sides, "Too short.", cancel, lambda _: None)
    assert caught.value.hint == "paste a longer text"

    def stop_half_way(progress: Progress) -> None:
        if progress.done == 3:
            cancel.set()

    with pytest.raises(Stopped):
        measure_both(sides, None, cancel, stop_half_way)

    def exchange(_: Progress) -> None:
        sides[1].load(catalog.find(FIRST), LoadOptions(), lambda _: None)

    with pytest.raises(GPTQLoaderError, match="another model was loaded"):
        measure_both(sides, None, threading.Event(), exchange)
    folder = altered.copy(SECOND, tmp_path / "other")

    def swap(table: dict[str, dict[str, dict[str, int]]]) -> None:
        vocabulary = table["model"]["vocab"]
        vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]

    altered.edit_json(folder / "tokenizer.json", swap)
    others = Catalog(models_dir=tmp_path, cache=False)
    sides[1].load(others.find("other"), LoadOptions(context=128), lambda _: None)
    with pytest.raises(OptionInvalid, match="other reads the text as other tokens than"):
        measure_both(sides, None, threading.Event(), lambda _: None)
    for side in sides:
        side.unload()
