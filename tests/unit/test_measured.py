"""What was measured is kept: a file for each checkpoint, whole or not at all."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from altered import DATA, ONE, plugins

import gptq_loader_plugin as gptq
from gptq_loader_plugin.errors import GPTQLoaderError, OptionInvalid
from gptq_loader_plugin.measure.perplexity import (
    SAMPLE,
    SAMPLE_WINDOW,
    Perplexity,
    cut_windows,
    mean_perplexity,
    measure_perplexity,
    sample_text,
    window_loss,
)
from gptq_loader_plugin.measure.results import (
    Measured,
    MeasuredFiles,
    MeasuredText,
    measurement,
)

if TYPE_CHECKING:
    from pathlib import Path

TEXT = MeasuredText(name="a text", digest="00ff", windows=3, window_tokens=64)


def figure(name: str = "owner/repo:branch", **fields: object) -> Measured:
    values = {
        "path": f"/models/{name}",
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "size_bytes": 1000,
        "text": TEXT,
        "perplexity": 10.5,
        "seconds": 1.0,
    }
    return Measured.model_validate({"name": name, **values, **fields})


def test_figures_are_read_back_the_newest_first(tmp_path: Path) -> None:
    files = MeasuredFiles(tmp_path / "new")
    assert files.read() == ([], "")
    one, two = figure("one"), figure("two", seconds=2.0)
    kept = [files.keep(it) for it in (one, two)]
    assert MeasuredFiles(tmp_path / "new").read() == ([two, one], "")
    assert sorted(files.folder.iterdir()) == sorted(kept), "nothing else lies there"
    assert kept[0].name.startswith("one-")


def test_a_figure_takes_the_place_of_the_one_on_the_same_text(tmp_path: Path) -> None:
    files = MeasuredFiles(tmp_path)
    files.keep(figure(perplexity=11.0))
    files.keep(figure(perplexity=10.0, seconds=2.0))
    other = TEXT.model_copy(update={"windows": 4})
    files.keep(figure(text=other, seconds=3.0))
    found, _ = files.read()
    assert [(it.text, it.perplexity) for it in found] == [(other, 10.5), (TEXT, 10.0)]


@pytest.mark.parametrize("name", ["../../etc/passwd", "a" * 300, "", "C:\\x", "naïve\x00name"])
def test_a_name_never_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    files = MeasuredFiles(tmp_path)
    kept = files.keep(figure(name))
    assert kept.parent == files.folder
    assert files.read()[0] == [figure(name)]


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"measured": [{"name": 1}]}', '{"measured": [{"perplexity": "NaN"}]}', "\x00"],
)
def test_a_damaged_file_is_put_aside_and_costs_no_other_figure(tmp_path: Path, text: str) -> None:
    files = MeasuredFiles(tmp_path)
    files.keep(figure("whole"))
    damaged = files.keep(figure("damaged"))
    damaged.write_text(text)
    found, note = files.read()
    assert [it.name for it in found] == ["whole"]
    aside = damaged.with_name(f"{damaged.stem}.damaged-1.json")
    assert note == f"a file of figures was damaged; it was put aside as {aside.name}"
    assert aside.read_text() == text
    assert files.read() == (found, ""), "it is told once"
    files.keep(figure("damaged"))
    assert len(files.read()[0]) == 2


def test_a_failed_write_says_what_to_do_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = MeasuredFiles(tmp_path)
    files.keep(figure())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(GPTQLoaderError, match="No space left on device") as caught:
        files.keep(figure(perplexity=9.0))
    assert "GPTQ_LOADER_DATA" in caught.value.hint
    assert files.read() == ([figure()], "")
    assert len(list(files.folder.iterdir())) == 1


def test_the_sample_is_measured_window_by_window() -> None:
    with gptq.load(DATA / ONE, device="cpu", plugins=plugins()) as model:
        cut = cut_windows(model, sample_text(), windows=4, window_tokens=SAMPLE_WINDOW)
        assert [len(it) for it in cut] == [SAMPLE_WINDOW] * 4
        losses = [window_loss(model, it) for it in cut]
        found = mean_perplexity(losses, window_tokens=SAMPLE_WINDOW)
        whole = measure_perplexity(model, sample_text(), windows=4, window_tokens=SAMPLE_WINDOW)
        assert found == whole
        assert found.perplexity == pytest.approx(math.exp(sum(losses) / (4 * 255)))
        kept = measurement(model, found, text=sample_text(), text_name=SAMPLE)
        assert (kept.name, kept.bits, kept.group_size, kept.desc_act) == (ONE, 4, 32, True)
        assert kept.size_bytes == (DATA / ONE / "model.safetensors").stat().st_size
        assert kept.kernels == tuple(model.plan.kernels())
        other = measurement(model, found, text="another", text_name=SAMPLE)
        assert other.text.key != kept.text.key, "a name is no content"
        with pytest.raises(GPTQLoaderError, match="the perplexity is nan"):
            measurement(model, Perplexity(math.nan, 4, 64), text="a", text_name="a")
        with pytest.raises(OptionInvalid, match="fewer than a window"):
            cut_windows(model, "short", windows=4, window_tokens=64)


def test_windows_that_were_not_all_read_are_another_measure() -> None:
    assert TEXT.key != TEXT.model_copy(update={"windows": 2}).key
    assert mean_perplexity([0.0, 0.0], window_tokens=3) == Perplexity(1.0, 2, 3)
