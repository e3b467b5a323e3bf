"""Check it, and where else it runs, in the Model tab of a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

from browsing import MARKS, expect, load

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = MARKS

NAME = "gptq-4bit-32g-act-sym"
# Note every bar that is drawn, however short its life.
WATCH = """window.seen = new Set(); new MutationObserver(() => {
  const bar = document.querySelector('#checking progress')
  if (bar) window.seen.add(bar.getAttribute('aria-label'))
}).observe(document.body, {childList: true, subtree: true, attributes: true})"""


def test_a_checkpoint_is_checked_and_its_engines_are_listed(empty: Page) -> None:
    load(empty, NAME)
    empty.evaluate(WATCH)
    empty.locator("#check").click()
    expect(empty.locator("#check-stop")).to_be_visible()
    expect(empty.locator("#checked")).to_contain_text(f"{NAME} is right.", timeout=120_000)
    assert "Layers" in empty.evaluate("[...window.seen]")
    expect(empty.locator("#check")).to_be_visible()
    expect(empty.locator("#checked")).to_contain_text("Perplexity of a page of English")
    empty.locator("#where").click()
    row = empty.locator("#engines tr").filter(
        has=empty.get_by_role("rowheader", name="vllm", exact=True)
    )
    expect(row.first).to_be_visible()
    expect(empty.locator("#engines")).to_contain_text("Rules of other programs")
    assert "yes" in empty.locator("#engines td.yes").first.inner_text()


def test_without_a_choice_it_says_so(empty: Page) -> None:
    empty.get_by_role("tab", name="Model").click()
    if empty.locator("#about h1").inner_text() != "No model is loaded":  # of another test
        empty.locator("#unload").click()
        expect(empty.locator("#loading")).to_contain_text("Unloaded")
    empty.locator("#check").click()
    expect(empty.locator("#checking [role=alert]")).to_contain_text("No model is chosen")
    empty.locator("#where").click()
    expect(empty.locator("#checking [role=alert]")).to_contain_text("No model is chosen")
