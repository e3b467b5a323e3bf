"""The chat page in a real browser, with a real checkpoint behind it."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import pytest
from browsing import (
    CHECKPOINT,
    ENVIRON,
    MARKS,
    PHONE,
    RUNS,
    TOO_WIDE,
    ask,
    expect,
    finish,
    opened,
    questions,
    replies,
    send,
)
from waiting import eventually

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from browsing import Server
    from playwright.sync_api import Browser, Page

pytestmark = MARKS


def test_it_says_what_runs_and_why(page: Page) -> None:
    plan = gptq.explain(
        CHECKPOINT,
        options=gptq.LoadOptions(device="cpu", dtype="float32"),
        plugins=gptq.Plugins(installed=True, environ=ENVIRON),
    )
    expect(page).to_have_title("gptq-4bit-32g-act-sym")
    expect(page.get_by_role("heading", level=1)).to_have_text("gptq-4bit-32g-act-sym")
    expect(page.locator("#headline")).to_have_text(plan.headline())
    expect(page.locator("#template")).to_have_text("checkpoint (chat_template.jinja)")
    why = page.locator("#why pre")
    expect(why).not_to_be_visible()
    page.locator("#why summary").click()
    expect(why).to_be_visible()
    for name, words in plan.choices[0].reasons():
        expect(why).to_contain_text(name)
        expect(why).to_contain_text(words)


def test_a_reply_streams_and_says_how_fast(page: Page) -> None:
    ask(page, "Hello", tokens=100)
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#message textarea")).to_have_value("")
    lengths = []

    def ended() -> bool:
        lengths.append(len("".join(replies(page))))
        return not page.locator("#stop").is_visible()

    eventually(ended, awaited="the end of the reply")
    finish(page)
    assert questions(page) == ["Hello"]
    assert len(set(lengths)) > 4, "it grew in several steps"
    expect(page.locator("#status")).to_contain_text(
        re.compile(
            r"100 tokens, [\d.]+ a second; the first after [\d.]+ s; 1\d\d of 512 .*; cut off"
        )
    )


def test_stop_stops_and_keeps_what_there_is(page: Page, server: Server) -> None:
    ask(page, "Tell me everything", tokens=450)
    expect(page.locator("#status")).to_contain_text(re.compile(r"[2-9]\d tokens"))
    page.locator("#stop").click()
    finish(page)
    expect(page.locator("#status")).to_contain_text("stopped")
    kept, steps = replies(page), server.steps()
    assert len(kept) == 1
    assert kept[0].strip()
    page.wait_for_timeout(1000)
    assert replies(page) == kept
    assert server.steps() == steps, "the model has stopped, and not only the page"
    ask(page, "And again", tokens=10)
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(2)
    finish(page)
    assert questions(page) == ["Tell me everything", "And again"]
    assert replies(page)[0] == kept[0], "the partial reply is part of the conversation"


def test_retry_undo_and_a_new_conversation(page: Page) -> None:
    for button in ("#continue", "#retry", "#undo"):
        expect(page.locator(f"{button}")).to_be_disabled()
    ask(page, "One", tokens=12)
    finish(page)
    first = replies(page)
    page.locator("#retry").click()
    expect(page.locator("#retry")).to_be_disabled()
    finish(page)
    assert replies(page) == first, "temperature 0 is deterministic"
    assert questions(page) == ["One"]
    expect(page.locator("#chat .bar").last).to_contain_text("2/2")
    ask(page, "Two", tokens=12)
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(2)
    finish(page)
    page.locator("#undo").click()
    expect(page.locator("#message textarea")).to_have_value("Two")
    assert questions(page) == ["One"]
    assert replies(page) == first
    page.locator("#new").click()
    expect(page.locator("#chat [data-testid=user]")).to_have_count(0)
    expect(page.locator("#undo")).to_be_disabled()


def test_an_error_is_words_and_loses_nothing(page: Page, server: Server) -> None:
    ask(page, "Hello", tokens=8)
    finish(page)
    before = replies(page)
    long = "word " * 900
    send(page, long)
    toast = page.get_by_test_id("toast-body")
    expect(toast).to_contain_text(
        re.compile(r"The prompt has [\d,]+ tokens, and the context is 512")
    )
    expect(toast).to_contain_text("Shorten the message, or the system message.")
    expect(page.locator("#message textarea")).to_have_value(long)
    expect(page.locator("#send")).to_be_visible()
    assert (questions(page), replies(page)) == (["Hello"], before)
    expect(page.locator("#chat").get_by_text("Error", exact=True)).to_have_count(0)
    assert "Traceback" not in server.log()


def test_a_wrong_setting_is_words(page: Page, server: Server) -> None:
    send(page, "Hello", tokens=0)
    expect(page.get_by_test_id("toast-body")).to_contain_text("The option max_new_tokens")
    expect(page.locator("#message textarea")).to_have_value("Hello")
    assert "Traceback" not in server.log()


def test_old_turns_that_no_longer_fit_are_left_out_with_a_warning(page: Page) -> None:
    for count in (1, 2, 3):
        ask(page, "word " * 70, tokens=4)
        expect(page.locator("#chat [data-testid=bot]")).to_have_count(count)
        finish(page)
    expect(page.get_by_test_id("toast-body").first).to_contain_text("were left out")
    expect(page.locator("#chat [data-testid=user]")).to_have_count(3)


def test_enter_sends_and_what_is_typed_meanwhile_stays(page: Page) -> None:
    box = page.locator("#message textarea")
    box.fill("first line")
    box.press("Shift+Enter")
    box.press_sequentially("second line")
    expect(box).to_have_value("first line\nsecond line")
    ask(page, "Hello", tokens=100)
    expect(page.locator("#stop")).to_be_visible()
    box.press_sequentially("next")
    box.press("Enter")  # a reply is being written: nothing is sent
    finish(page)
    expect(box).to_have_value(re.compile("^next"))
    assert questions(page) == ["Hello"]


def test_markup_that_is_typed_is_shown(page: Page) -> None:
    ask(page, "<b>bold</b> and <|im_end|> and `a<b`", tokens=4)
    finish(page)
    assert questions(page) == ["<b>bold</b> and <|im_end|> and a<b"]


def test_two_browsers_talk_at_once_and_apart(browser: Browser, server: Server) -> None:
    with opened(browser, server) as (one, first), opened(browser, server) as (two, second):
        ask(one, "From one", tokens=100)
        ask(two, "From two", tokens=100)
        expect(two.locator("#status")).to_contain_text(RUNS)
        expect(one.locator("#stop")).to_be_visible()
        expect(two.locator("#stop")).to_be_visible()
        one.locator("#stop").click()
        finish(one)
        expect(two.locator("#stop")).to_be_visible()
        finish(two)
        assert (questions(one), questions(two)) == (["From one"], ["From two"])
        assert len(replies(one)) == len(replies(two)) == 1
        assert first == second == []


def test_a_closed_tab_ends_its_reply(browser: Browser, server: Server) -> None:
    with opened(browser, server) as (page, _):
        ask(page, "Tell me everything", tokens=450)
        expect(page.locator("#status")).to_contain_text(RUNS)

    def stands_still() -> bool:
        steps = server.steps()
        time.sleep(1)
        return server.steps() == steps

    eventually(stands_still, seconds=5, awaited="the model to stop")  # all of it takes nine seconds


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Browser, server: Server, scheme: str
) -> None:
    with opened(browser, server, viewport=PHONE, color_scheme=scheme) as (page, errors):
        ask(page, "Hello " + "x" * 200, tokens=40)
        finish(page)
        page.locator("#why summary").click()
        page.locator("#sampling button").first.click()
        expect(page.locator("#seed")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate("document.body.classList.contains('dark')") == (scheme == "dark")
        assert errors == []


def test_nothing_leaves_this_machine(browser: Browser, server: Server) -> None:
    """Not a font, not a count of visits, and not a picture that a reply may name."""
    with opened(browser, server) as (page, errors):
        requests, responses = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("response", lambda response: responses.append(response.url))
        page.reload(wait_until="domcontentloaded")
        expect(page.locator("#send")).to_be_visible(timeout=30_000)
        ask(page, "![picture](http://192.0.2.1/picture.png)", tokens=4)
        finish(page)
        outside = [url for url in requests if not url.startswith((server.url, "data:", "blob:"))]
        assert len(responses) > 20
        assert set(outside) <= {"http://192.0.2.1/picture.png"}
        assert not [url for url in responses if url in outside]
        assert all("Content Security Policy" in error for error in errors), errors
        assert errors, "the picture was refused, not only slow"
    assert "OUTSIDE" not in server.log()
