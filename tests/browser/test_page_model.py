"""The Model tab in a real browser: choose, load, see why, save, reload, unload."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING

import pytest
from browsing import (
    CHECKPOINTS,
    MARKS,
    PHONE,
    TOO_WIDE,
    ask,
    choose,
    expect,
    finish,
    load,
    opened,
    replies,
    started,
)

if TYPE_CHECKING:
    from pathlib import Path

    from browsing import Server
    from playwright.sync_api import Browser, Page

pytestmark = MARKS

# Note every bar that is drawn, however short its life.
WATCH = """window.seen = new Set(); new MutationObserver(() => {
  const bar = document.querySelector('#loading progress')
  if (bar) window.seen.add(bar.getAttribute('aria-label'))
}).observe(document.body, {childList: true, subtree: true, attributes: true})"""
FIRST, SECOND = "gptq-4bit-32g-act-sym", "gptq-3bit-128g-act-sym"


def test_without_a_model_it_opens_where_one_is_chosen(browser: Browser, registry: Server) -> None:
    with opened(browser, registry) as (page, errors):
        page.get_by_role("tab", name="Model").click()
        if page.locator("#about h1").inner_text() != "No model is loaded":  # of another test
            page.locator("#unload").click()
            expect(page.locator("#loading")).to_contain_text("Unloaded")
            page.reload(wait_until="domcontentloaded")
        for button in ("#save", "#reload", "#unload"):
            expect(page.locator(button)).to_be_disabled()
        expect(page.locator("#about h1")).to_have_text("No model is loaded")
        expect(page.locator("#model")).to_be_visible()
        page.get_by_role("tab", name="Chat").click()
        page.locator("#message textarea").fill("Hello")
        page.locator("#message textarea").press("Enter")
        expect(page.get_by_test_id("toast-body")).to_contain_text(
            "No model is loaded. Choose one in the Model tab."
        )
        expect(page.locator("#message textarea")).to_have_value("Hello")
        assert errors == []


def test_choosing_loads_with_progress_and_says_what_and_why(empty: Page) -> None:
    empty.evaluate(WATCH)
    load(empty, FIRST)
    assert "Loading the weights" in empty.evaluate("[...window.seen]")
    expect(empty.locator("#about h1")).to_have_text(FIRST)
    row = empty.locator("#facts tr")
    for name, value, source in (
        ("Bits", "4", "quantize_config.json"),
        ("Group size", "32 rows", "quantize_config.json"),
        ("Act-order", "yes", "quantize_config.json"),
        ("Damping", "0.1", "quantize_config.json, meta"),
        ("Template", "checkpoint, stops at <|im_end|>", "chat_template.jinja"),
    ):
        parameter = row.filter(has=empty.get_by_role("rowheader", name=name, exact=True))
        assert parameter.locator("td").all_inner_texts() == [value, source]
    expect(empty.locator("#plan tr.chosen")).to_contain_text("chosen: ")
    expect(empty.locator("#plan table")).to_contain_text("ranks below cpu")
    expect(empty.locator("#plan figcaption")).to_contain_text(
        re.compile(r"Up to .* on this device; the process held .* before, and .* after")
    )
    expect(empty.locator("#plan .memory")).to_contain_text("Keys and values of 512 tokens")
    widths = {
        part: empty.locator(f"#plan i.{part}").evaluate("it => it.clientWidth")
        for part in ("weights", "kv", "scratch")
    }
    assert min(widths.values()) > 2, widths


def test_another_model_takes_the_place_of_the_first(empty: Page) -> None:
    load(empty, FIRST)
    load(empty, SECOND)
    expect(empty.locator("#facts")).to_contain_text("128 rows")
    empty.get_by_role("tab", name="Chat").click()
    ask(empty, "Hello", tokens=8)
    finish(empty)
    assert len(replies(empty)) == 1
    empty.get_by_role("tab", name="Model").click()
    empty.locator("#unload").click()
    expect(empty.locator("#about h1")).to_have_text("No model is loaded")
    expect(empty.locator("#loading")).to_contain_text(re.compile("Unloaded. The process held .*"))
    expect(empty.locator("#facts table")).to_have_count(0)


def test_what_cannot_be_loaded_says_why_and_leaves_the_old_one(
    empty: Page, registry: Server
) -> None:
    load(empty, FIRST)
    empty.locator("#temperature input[type=number]").fill("0.35")
    empty.locator("#temperature input[type=number]").blur()
    expect(empty.locator("#preset input")).to_have_value("Custom")
    choose(empty, "damaged")
    alert = empty.locator("#loading [role=alert]")
    expect(alert).to_contain_text("model.safetensors", timeout=30_000)
    expect(alert).to_contain_text("Download")
    expect(empty.locator("#about h1")).to_have_text(FIRST)
    expect(empty.locator("#model input")).to_have_value(re.compile(f"^{FIRST} "))
    expect(empty.locator("#temperature input[type=number]")).to_have_value("0.35")
    expect(empty.locator("#facts")).to_contain_text("32 rows")
    empty.wait_for_timeout(1000)  # the list of models is sent again after a load
    empty.locator("#model input").click()
    empty.keyboard.press("Control+a")
    empty.keyboard.type("damaged")  # in place of the name that is there
    expect(empty.get_by_role("option")).to_have_count(1)
    empty.keyboard.press("Escape")
    empty.get_by_role("tab", name="Chat").click()
    ask(empty, "Are you still there?", tokens=4)
    finish(empty)
    assert "Traceback" not in registry.log()


def test_a_load_is_cancelled_and_says_what_became_of_the_old_one(
    browser: Browser, models: Path, tmp_path: Path
) -> None:
    """It waits for a reply, which is slow here, and the old model stays."""
    environ = {
        "GPTQ_LOADER_CONFIG": str(tmp_path),
        "GPTQ_LOADER_MODELS": str(models),
        "STEP_SECONDS": "0.3",
    }
    with (
        started(record=tmp_path / "steps", environ=environ) as served,
        opened(browser, served) as (page, errors),
    ):
        load(page, FIRST)
        page.get_by_role("tab", name="Chat").click()
        ask(page, "Hello", tokens=400)
        choose(page, SECOND)
        expect(page.locator("#loading")).to_contain_text("a reply is still being written")
        page.locator("#load-cancel").click()
        expect(page.locator("#loading")).to_contain_text(f"Stopped. {FIRST} is still loaded.")
        expect(page.locator("#model input")).to_have_value(re.compile(FIRST))
        expect(page.locator("#load-cancel")).to_be_hidden()
        expect(page.locator("#refresh")).to_be_visible()
        expect(page.locator("#facts")).to_contain_text("32 rows")
        page.get_by_role("tab", name="Chat").click()
        page.locator("#stop").click()
        finish(page)
        load(page, SECOND)
        assert errors == []


def test_refresh_finds_what_came_later(empty: Page, models: Path) -> None:
    shutil.copytree(CHECKPOINTS / "gptq-2bit-64g-noact-sym", models / "came-later")
    (models / "no-model").mkdir()
    try:
        empty.get_by_role("tab", name="Model").click()
        empty.locator("#refresh").click()
        expect(empty.locator("#loading [role=note]")).to_have_text(
            "1 folder holds no GPTQ checkpoint: no-model."
        )
        load(empty, "came-later")
    finally:
        (models / "no-model").rmdir()
        shutil.rmtree(models / "came-later")
        empty.locator("#unload").click()


def test_settings_are_saved_and_used_and_survive_a_restart(
    browser: Browser, registry: Server, empty: Page, config: Path, models: Path, tmp_path: Path
) -> None:
    load(empty, FIRST)
    empty.locator("#how button").first.click()
    empty.locator("#context input").fill("256")
    empty.locator("#context input").blur()
    empty.locator("#backend input").click()
    empty.get_by_role("option", name="dense").click()
    empty.locator("#system textarea").fill("Be brief.")
    empty.locator("#temperature input[type=number]").fill("0.25")
    empty.locator("#temperature input[type=number]").blur()
    empty.locator("#save").click()
    expect(empty.locator("#loading")).to_contain_text(f"Saved for {FIRST}.")
    empty.locator("#reload").click()
    expect(empty.locator("#headline")).to_contain_text("dense (all 14 layers)", timeout=30_000)
    expect(empty.locator("#about")).to_contain_text("context 256")
    saved = json.loads((config / "page-settings.json").read_text())["models"][FIRST]
    assert (saved["backend"], saved["context"], saved["system"]) == ("dense", 256, "Be brief.")
    load(empty, SECOND)
    expect(empty.locator("#system textarea")).to_have_value("")
    expect(empty.locator("#about")).to_contain_text("context 512")
    environ = {"GPTQ_LOADER_CONFIG": str(config), "GPTQ_LOADER_MODELS": str(models)}
    with (
        started(record=tmp_path / "steps", environ=environ) as again,
        opened(browser, again) as (page, errors),
    ):
        load(page, FIRST)
        expect(page.locator("#headline")).to_contain_text("dense (all 14 layers)")
        expect(page.locator("#about")).to_contain_text("context 256")
        expect(page.locator("#system textarea")).to_have_value("Be brief.")
        expect(page.locator("#temperature input[type=number]")).to_have_value("0.25")
        assert errors == []


def test_damaged_settings_are_renamed_with_a_note(
    empty: Page, registry: Server, config: Path
) -> None:
    file = config / "page-settings.json"
    before = file.read_bytes() if file.exists() else None
    file.write_text('{"models": {"' + FIRST)
    load(empty, SECOND)
    expect(empty.locator("#loading [role=note]")).to_contain_text(
        "The settings file was damaged; it was renamed to page-settings.damaged-1.json."
    )
    assert (config / "page-settings.damaged-1.json").read_text() == '{"models": {"' + FIRST
    assert not file.exists()
    if before is not None:
        file.write_bytes(before)
    assert "Traceback" not in registry.log()


def test_a_name_that_is_not_listed_is_not_loaded(empty: Page, registry: Server) -> None:
    """Neither by typing it, nor by sending it to the server past the page."""
    empty.get_by_role("tab", name="Model").click()
    before = empty.locator("#about h1").inner_text()
    config = empty.evaluate("fetch('config').then(it => it.json())")
    box = next(part for part in config["components"] if part["props"].get("elem_id") == "model")
    event = next(
        listed for listed in config["dependencies"] if [box["id"], "select"] in listed["targets"]
    )
    for name in ("/etc", "../..", str(CHECKPOINTS / FIRST), "\x00", "owner/repo"):
        sent = empty.evaluate(
            """([index, name]) => fetch('gradio_api/queue/join', {
              method: 'POST', headers: {'content-type': 'application/json'},
              body: JSON.stringify({data: [name], fn_index: index, session_hash: 'stranger'}),
            }).then(it => it.status)""",
            [event["id"], name],
        )
        assert sent in (200, 404, 422)
    empty.wait_for_timeout(1000)
    empty.reload(wait_until="domcontentloaded")
    expect(empty.locator("#about h1")).to_have_text(before)
    registry.forget_log()  # gradio itself refuses what is not in its list, and logs it


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_every_tab_without_scrolling_sideways(
    browser: Browser, registry: Server, scheme: str
) -> None:
    with opened(browser, registry, viewport=PHONE, color_scheme=scheme) as (page, errors):
        load(page, FIRST)
        for name in ("Model", "Raw", "Chat"):
            page.get_by_role("tab", name=name).click()
            page.wait_for_timeout(200)
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
            assert page.evaluate(TOO_WIDE) == [], name
        assert errors == []
