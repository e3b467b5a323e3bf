"""The Compare tab in a real browser, with two real checkpoints behind it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from browsing import MARKS, RUNS, expect, load

if TYPE_CHECKING:
    from browsing import Server
    from playwright.sync_api import Page

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


def test_one_prompt_goes_through_two_models(empty: Page, shelf: Server) -> None:
    alone = {}
    for side, name in (("two", SECOND), ("one", FIRST)):
        load(empty, name)
        complete(empty)
        alone[side] = empty.locator("#raw-reply textarea").input_value()
    assert alone["one"] != alone["two"]
    empty.get_by_role("tab", name="Compare").click()
    empty.locator("#system textarea").fill("")  # saved by another test, and not for Raw
    empty.locator("#compare-message textarea").fill("Hello")
    empty.locator("#compare").click()
    expect(empty.locator("#compare-words [role=alert]")).to_contain_text("No model is loaded")
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
        written = empty.locator(f"#reply-{side} textarea").input_value()
        assert written == alone[side]
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
    assert "Traceback" not in shelf.log()
