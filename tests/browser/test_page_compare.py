"""The Compare tab in a real browser, with two real checkpoints behind it."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING

import pytest
from browsing import ENVIRON, MARKS, PHONE, RUNS, TOO_WIDE, expect, load, opened, started
from processes import run_process

if TYPE_CHECKING:
    from pathlib import Path

    from browsing import Server
    from playwright.sync_api import Browser, Page

pytestmark = MARKS

HELLO = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
FIRST, SECOND = "gptq-4bit-32g-act-sym", "gptq-3bit-128g-act-sym"


def complete(page: Page) -> None:
    """Have the model that is loaded answer "Hello" alone, by the same tokens as a chat."""
    for name, value in (("temperature", 0), ("max_new_tokens", 8)):
        setting = page.locator(f"#{name} input[type=number]")
        setting.fill(str(value))
        setting.blur()
    page.get_by_role("tab", name="Raw").click()
    page.locator("#raw-append").click()  # which empties the reply before
    expect(page.locator("#raw-status")).to_have_text("")
    page.locator("#raw-prompt textarea").fill(HELLO)
    page.locator("#raw-complete").click()
    expect(page.locator("#raw-status")).to_contain_text("cut off")


def test_one_prompt_goes_through_two_models(empty: Page, registry: Server) -> None:
    alone = {}
    for side, name in (("two", SECOND), ("one", FIRST)):
        load(empty, name)
        complete(empty)
        alone[side] = empty.locator("#raw-reply textarea").input_value()
    assert alone["one"] != alone["two"]
    empty.get_by_role("tab", name="Compare").click()
    empty.locator("#system textarea").fill("")  # saved by another test, and not for Raw
    empty.locator("#compare-message textarea").fill("Hello")
    expect(empty.locator("#compare")).to_be_disabled()  # until there is a second one
    empty.locator("#other input").click()
    empty.get_by_role("option", name=f"{SECOND} (").click()
    expect(empty.locator("#other-loading")).to_contain_text("Loaded in", timeout=30_000)
    expect(empty.locator("#name-one")).to_contain_text(
        re.compile(rf"{FIRST}.*groups of 32", re.DOTALL)
    )
    expect(empty.locator("#name-two")).to_contain_text("3-bit, groups of 128")
    empty.locator("#compare").click()
    expect(empty.locator("#compare-words")).to_contain_text(re.compile("same|differ"))
    for side in ("one", "two"):
        expect(empty.locator(f"#status-{side}")).to_contain_text(RUNS)
        written = empty.locator(f"#reply-{side}").inner_text()
        assert " ".join(written.split()) == " ".join(alone[side].split())
    tops = {
        empty.locator(f"#reply-{side}").evaluate("it => it.getBoundingClientRect().top")
        for side in ("one", "two")
    }
    assert len(tops) == 1, "they stand at one height"
    empty.locator("#max_new_tokens input").fill("400")
    empty.locator("#max_new_tokens input").blur()
    empty.locator("#compare").click()
    expect(empty.locator("#status-two")).to_contain_text(RUNS)
    empty.locator("#compare-stop").click()
    expect(empty.locator("#status-one")).to_contain_text("stopped")
    expect(empty.locator("#status-two")).to_contain_text("stopped")
    empty.locator("#compare-unload").click()
    expect(empty.locator("#name-two")).to_contain_text("No model is loaded")
    expect(empty.locator("#about h1")).to_have_text(FIRST)
    assert "Traceback" not in registry.log()


def test_models_are_measured_and_drawn(browser: Browser, models: Path, tmp_path: Path) -> None:
    """By the button, in the terminal, and on a text of one's own; a figure stays for a restart."""
    environ = {"GPTQ_LOADER_CONFIG": str(tmp_path), "GPTQ_LOADER_MODELS": str(models)}
    chart, slow = "#chart", {"STEP_SECONDS": "0.4"}  # so that there is time to stop it
    with (
        started(record=tmp_path / "steps", environ=environ | slow) as served,
        opened(browser, served) as (page, errors),
    ):
        page.get_by_role("tab", name="Compare").click()
        expect(page.locator(chart)).to_contain_text("Nothing is measured yet")
        page.locator("#measure").click()
        alert = page.locator("#measuring [role=alert]")
        expect(alert).to_have_text("No model is loaded. Choose one in the Model tab.")
        load(page, FIRST)
        page.get_by_role("tab", name="Compare").click()
        page.locator("#measure").click()
        expect(page.locator("#measuring")).to_contain_text(f"Measured: {FIRST} has ")
        expect(page.locator(f"{chart} .mark")).to_have_count(1)
        page.get_by_label("My own text").check()
        page.locator("#measure-text textarea").fill("Too short.")
        page.locator("#measure").click()
        expect(alert).to_contain_text("fewer than a window of 256. Paste a longer text.")
        page.locator("#measure-text textarea").fill("The tide rises and falls. " * 200)
        page.locator("#measure").click()
        expect(page.locator("#measuring")).to_contain_text(f"Measured: {FIRST} has ")
        expect(page.locator(chart)).to_contain_text("Measured on “The tide rises")
        page.locator("#measure-text textarea").fill("The tide rises and falls. " * 2000)
        page.locator("#measure").click()
        expect(page.locator("#measuring")).to_contain_text(re.compile(r"\d of 20 windows"))
        page.keyboard.press("Escape")
        expect(page.locator("#measuring")).to_contain_text("Measured: stopped.")
        expect(page.locator("#measure")).to_be_visible()
        page.locator("#measured-on input").click()
        page.get_by_role("option", name="Sample text").click()
        expect(page.locator(chart)).to_contain_text("Measured on Sample text")
        completed = run_process(
            [sys.executable, "-m", "gptq_loader_plugin", "perplexity", models / SECOND],
            env={**os.environ, **ENVIRON, **environ, "GPTQ_LOADER_DATA": str(tmp_path / "data")},
            check=True,
        )
        assert str(tmp_path / "data" / "perplexity" / SECOND) in completed.stderr
        page.get_by_role("tab", name="Chat").click()
        page.get_by_role("tab", name="Compare").click()
        expect(page.locator(f"{chart} .mark")).to_have_count(2)
        rows = page.locator(f"{chart} tbody tr")
        cells = [row.split("\t") for row in rows.all_inner_texts()]
        figures = {name: float(perplexity) for name, perplexity, *_ in cells}
        assert figures[SECOND] == pytest.approx(float(completed.stdout), abs=0.001)
        assert errors == []
    with (
        started(record=tmp_path / "steps", environ=environ) as served,
        opened(browser, served, viewport=PHONE) as (page, errors),
    ):
        page.get_by_role("tab", name="Compare").click()
        expect(page.locator(f"{chart} .mark")).to_have_count(2)
        inside = page.locator(f"{chart} .plot").bounding_box()
        for label in page.locator(f"{chart} .mark text:visible").all():
            box = label.bounding_box()
            assert box
            assert inside
            assert box["x"] >= inside["x"]
            assert box["x"] + box["width"] <= inside["x"] + inside["width"]
        assert page.evaluate(TOO_WIDE) == []
        assert errors == []


def test_both_are_measured_as_the_command_does(
    browser: Browser, models: Path, tmp_path: Path
) -> None:
    """The figures of `gptq-loader compare`; stopped half way; and what is wrong, in words."""
    environ = {"GPTQ_LOADER_CONFIG": str(tmp_path), "GPTQ_LOADER_MODELS": str(models)}
    slow = {"STEP_SECONDS": "0.15"}  # so that there is time to stop it
    with (
        started(record=tmp_path / "steps", environ=environ | slow) as served,
        opened(browser, served) as (page, errors),
    ):
        page.get_by_role("tab", name="Compare").click()
        alert = page.locator("#measuring [role=alert]")
        page.locator("#measure-both").click()
        expect(alert).to_have_text("No model is loaded. Choose one in the Model tab.")
        load(page, FIRST)
        page.get_by_role("tab", name="Compare").click()
        page.locator("#measure-both").click()
        expect(alert).to_have_text("There is no second model. Choose one above.")
        page.locator("#other input").click()
        page.get_by_role("option", name=f"{SECOND} (").click()
        expect(page.locator("#other-loading")).to_contain_text("Loaded in", timeout=30_000)
        page.locator("#measure-both").click()
        expect(page.locator("#measuring")).to_contain_text(re.compile(r"\d of \d+ windows"))
        page.locator("#measure-stop").click()
        expect(page.locator("#measuring")).to_have_text("Stopped.")
        expect(page.locator("#measure-both")).to_be_visible()
        expect(page.locator("#compared table")).to_have_count(0)
        page.locator("#measure-both").click()
        expect(page.locator("#measure-both")).to_be_hidden()
        expect(page.locator("#compared table")).to_be_visible(timeout=120_000)
        expect(page.locator("#measure-both")).to_be_visible()
        completed = run_process(
            [
                *(sys.executable, "-m", "gptq_loader_plugin", "compare"),
                *(models / FIRST, models / SECOND, "--json", "--no-speed"),
            ],
            env={**os.environ, **ENVIRON, **environ, "GPTQ_LOADER_DATA": str(tmp_path / "other")},
            check=True,
        )
        said = json.loads(completed.stdout)
        rows = page.locator("#compared tbody tr")
        cells = [row.split("\t") for row in rows.all_inner_texts()]
        for row, model in zip(cells, said["models"], strict=True):
            it = model["divergence"]
            assert float(row[3]) == pytest.approx(model["perplexity"], abs=0.001)
            assert float(row[4]) == pytest.approx(it["mean"], rel=0.06), "two digits are shown"
            assert float(row[6]) == pytest.approx(it["p90"], rel=0.06)
            assert row[7] == f"{100 * it['top1']:.1f} %"
            assert float(row[9].replace(",", "")) > 0, "it is timed, too"
        expect(page.locator("#compared .bar")).to_have_count(4)
        expect(page.locator("#compared")).to_contain_text(
            re.compile(r"times as much as rounding makes\. Both have the same likeliest token in")
        )
        expect(page.locator("#chart .mark")).to_have_count(2)  # which keeps their perplexities
        page.get_by_label("My own text").check()
        page.locator("#measure-text textarea").fill("Too short.")
        page.locator("#measure-both").click()
        expect(alert).to_contain_text("Paste a longer text.")
        page.set_viewport_size(PHONE)
        assert page.evaluate(TOO_WIDE) == []
        assert errors == []
