"""The page of sampling reports in a browser: 250 prompts of three models, searched and compared."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from browsing import PHONE, expect
from hub_server import BRANCHES, REPO

from gptq_loader_plugin.sampling.report import Answered, Report, Result, Stat
from gptq_loader_plugin.sampling.viewer import viewer_page

if TYPE_CHECKING:
    from pathlib import Path

    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
COUNT = 250
REPLY = "The sea is wide and the wind is cold tonight. " * 26  # about 1,200 characters


def report(name: str, changed: str) -> Report:
    prompts, stats = [], []
    for number in range(COUNT):
        text = REPLY if number % 5 else REPLY.replace("wide", changed, 1)
        outputs = [f"{number} {text}", f"{number} other {text}<|endoftext|>"]
        prompts.append(
            Answered(
                prompt=f"Question {number}: <img src=x onerror=alert(1)>",
                results=[
                    Result(sampling_config="k50", sampling_params={"top_k": 50}, outputs=outputs),
                    Result(sampling_config="greedy", outputs=outputs[:1]),
                ],
            )
        )
        stat = Stat(tokens=100, seconds=2.0, finish="length")
        stats.append([[stat, stat], [stat]])
    return Report(model_name=name, date="", args={}, prompts=prompts, stats=stats)


@pytest.fixture
def viewer(browser: Browser, tmp_path: Path) -> Page:
    file = tmp_path / "viewer.html"
    reports = [report("first", "wide"), report("second", "narrow"), report("third", "deep")]
    file.write_text(viewer_page(reports))
    page = browser.new_page()
    page.on("dialog", lambda dialog: pytest.fail(dialog.message))
    page.goto(file.as_uri())
    return page


def test_replies_are_searched_and_compared(viewer: Page, tmp_path: Path) -> None:
    expect(viewer.locator("#count")).to_have_text(f"{COUNT} of {COUNT} prompts")
    expect(viewer.locator(".prompt")).to_have_count(COUNT)
    rows = viewer.locator("#summary tr")
    expect(rows).to_have_count(1 + 3 * 2)
    expect(rows.nth(1)).to_contain_text("50.0")  # tokens a second
    viewer.get_by_role("button", name="Question 10:").click()
    replies = viewer.locator(".reply")
    expect(replies).to_have_count(9)
    expect(replies.locator("mark").first).to_have_text("narrow")
    assert "<|endoftext|>" not in viewer.locator("main").inner_text()
    viewer.locator("#setting").select_option("greedy")
    expect(replies).to_have_count(3)
    viewer.locator("#output").select_option("1")  # greedy has one reply: it is shown
    expect(replies).to_have_count(3)
    viewer.locator("#search").fill("deep")
    expect(viewer.locator("#count")).to_have_text(f"{COUNT // 5} of {COUNT} prompts")
    viewer.locator("#search").fill("")
    viewer.locator("#differing").check()
    expect(viewer.locator("#count")).to_have_text(f"{COUNT // 5} of {COUNT} prompts")
    other = report("fourth", "calm")
    (tmp_path / "fourth.json").write_text(json.dumps(other.model_dump()))
    viewer.locator("#more").set_input_files(tmp_path / "fourth.json")
    expect(replies).to_have_count(4)


def test_hundreds_that_are_open_are_drawn_where_they_are_seen(viewer: Page) -> None:
    viewer.get_by_role("button", name="Open all").click()
    expect(viewer.locator(".reply").first).to_be_visible()
    assert viewer.locator(".reply").count() < COUNT
    viewer.locator(".prompt").last.scroll_into_view_if_needed()
    expect(viewer.locator(".prompt").last.locator(".reply").first).to_be_visible()
    viewer.get_by_role("button", name="Close all").click()
    expect(viewer.locator(".reply")).to_have_count(0)


def test_six_branches_of_a_repository_stand_side_by_side(browser: Browser, tmp_path: Path) -> None:
    names = [f"{REPO}:{branch}" for branch in BRANCHES]
    file = tmp_path / "viewer.html"
    file.write_text(viewer_page([report(name, f"wide, says {name}") for name in names]))
    page = browser.new_page(viewport=PHONE)
    page.goto(file.as_uri())
    expect(page.locator("#count")).to_have_text(f"{COUNT} of {COUNT} prompts")
    rows = page.locator("#summary tr")
    expect(rows).to_have_count(1 + len(names) * 2)
    for name in names:
        expect(rows.filter(has_text=name)).to_have_count(2)
    page.locator("#setting").select_option("greedy")
    page.get_by_role("button", name="Question 245:").click()
    replies = page.locator(".reply")
    expect(replies).to_have_count(len(names))
    for at, (branch, name) in enumerate(zip(BRANCHES, names, strict=True)):
        expect(replies.nth(at)).to_contain_text(f"says {name}")
        expect(replies.nth(at).locator("strong")).to_have_text(branch)
    name_box, header = rows.nth(1).locator("td").first.bounding_box(), page.locator("header")
    assert name_box
    assert name_box["width"] > PHONE["width"] / 2, "names are not a letter a line"
    expect(header).not_to_be_in_viewport()
    page.locator("#search").fill(f"says {names[-1]}")
    expect(page.locator("#count")).to_have_text(f"{COUNT // 5} of {COUNT} prompts")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no sideways scroll"
    page.close()
