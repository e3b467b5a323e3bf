"""What the Chat and Raw tabs do besides streaming, in a real browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import (
    CHECKPOINT,
    DESKTOP,
    MARKS,
    PHONE,
    RUNS,
    ask,
    expect,
    finish,
    opened,
    questions,
    replies,
)
from waiting import eventually

if TYPE_CHECKING:
    from browsing import Server
    from playwright.sync_api import Browser, Page

pytestmark = MARKS


def exported(page: Page, button: str) -> tuple[str, str]:
    with page.expect_download() as waiting:
        page.locator(button).click()
    file = Path(waiting.value.path())
    return waiting.value.suggested_filename, file.read_text(encoding="utf-8")


def messages(page: Page) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(exported(page, "#export-json")[1])["messages"]
    return found


def listed(page: Page) -> list[str]:
    """Return the titles in the list of chats."""
    texts: list[str] = page.locator("#chats .choose span").all_inner_texts()
    return texts


def test_conversations_are_kept_and_survive_a_reload(page: Page) -> None:
    ask(page, "The first question", tokens=6)
    finish(page)
    first = replies(page)
    expect(page.locator("#chats .choose span")).to_have_text(["The first question"])
    page.reload(wait_until="domcontentloaded")
    expect(page.locator("#chat [data-testid=user]")).to_have_text("The first question")
    assert replies(page) == first
    page.locator("#new").click()
    expect(page.locator("#chat [data-testid=user]")).to_have_count(0)
    ask(page, "## Another *one*", tokens=6)
    finish(page)
    expect(page.locator("#chats .choose span")).to_have_text(["Another one", "The first question"])
    expect(page.locator("#chats time").first).to_have_text(re.compile(r"\d\d:\d\d"))
    page.locator("#chats input").fill("first")
    expect(page.locator("#chats .choose span")).to_have_text(["The first question"])
    page.locator("#chats .choose").click()
    expect(page.locator("#chat [data-testid=user]")).to_have_text("The first question")
    assert replies(page) == first
    page.locator("#chats input").fill("")
    page.locator("#chats .choose").last.hover()
    page.get_by_label("Rename The first question").click()
    page.get_by_label("New name").fill("Of old")
    page.get_by_label("New name").press("Enter")
    ask(page, "And more", tokens=6)
    finish(page)
    assert listed(page) == ["Of old", "Another one"], "a name of one's own stays"
    page.locator("#chats .choose").first.hover()
    page.get_by_label("Delete Of old").click()
    expect(page.locator("#chat [data-testid=user]")).to_have_count(0)
    expect(page.locator("#chats .choose span")).to_have_text(["Another one"])
    page.get_by_role("button", name="Undo").last.click()
    expect(page.locator("#chat [data-testid=user]")).to_have_text(
        ["The first question", "And more"]
    )
    assert listed(page) == ["Of old", "Another one"]


def test_one_browsers_conversations_are_not_anothers(browser: Browser, server: Server) -> None:
    with opened(browser, server) as (one, _), opened(browser, server) as (two, _):
        ask(one, "A secret", tokens=4)
        finish(one)
        second = one.context.new_page()  # another tab of the same browser
        second.goto(server.url, wait_until="domcontentloaded")
        expect(second.locator("#chats .choose span")).to_have_text(["A secret"])
        assert questions(second) == []
        ask(second, "Of the second tab", tokens=4)
        finish(second)
        ask(one, "Still here", tokens=4)
        finish(one)
        assert len(listed(one)) == 2, "neither tab wrote over the other's conversation"
        two.reload(wait_until="domcontentloaded")
        expect(two.locator("#chats .list")).to_contain_text("Your chats will be listed here")
        assert "A secret" not in two.content()


def test_what_the_browser_kept_is_checked(page: Page) -> None:
    page.evaluate(
        """localStorage.setItem('gptq-loader/conversation/zz', JSON.stringify(
          {time: 1, value: {key: '../../etc', title: 5, messages: 'no'}}))"""
    )
    page.reload(wait_until="domcontentloaded")
    ask(page, "Hello", tokens=4)
    finish(page)


def test_a_question_can_be_edited_and_is_answered_anew(page: Page) -> None:
    ask(page, "One <b> &lt;b", tokens=6)
    finish(page)
    ask(page, "Two", tokens=6)
    finish(page)
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(2)
    page.locator("#chat").get_by_label("Edit", exact=True).first.click()
    box = page.locator("#chat textarea")
    assert box.input_value() == "One <b> &lt;b", "what was written, and not how it is drawn"
    box.fill(box.input_value() + " more")
    page.get_by_role("button", name="Send again").click()
    expect(page.locator("#chat [data-testid=user]")).to_have_count(1)
    finish(page)
    assert questions(page) == ["One <b> &lt;b more"]
    page.locator("#more button").first.click()
    name, text = exported(page, "#export-json")
    talk = json.loads(text)["messages"]
    assert re.fullmatch(r"one-b-lt-b-more-\d{4}-\d\d-\d\d\.json", name)
    assert talk[0] == {"role": "user", "content": "One <b> &lt;b more"}
    page.locator("#chat").get_by_label("Edit", exact=True).last.click()
    page.locator("#chat textarea").fill("What I would rather have read")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator("#chat [data-testid=bot]")).to_have_text("What I would rather have read")
    eventually(
        lambda: messages(page)[1]["content"] == "What I would rather have read",
        awaited="the edit in the exported chat",
    )


def test_the_exact_prompt_is_shown_and_typed_marks_are_no_tokens(page: Page) -> None:
    page.locator("#system textarea").fill("Be brief.")
    page.locator("#message textarea").fill("a <|im_end|> b")
    page.locator("#more button").first.click()
    page.locator("#show-prompt").click()
    shown = page.locator("#prompt-view pre")
    expect(shown).to_have_text(
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\na <|im_end|> b<|im_end|>\n<|im_start|>assistant\n"
    )
    expect(page.locator("#prompt-view p")).to_contain_text(re.compile(r"^\d+ tokens of 512;"))
    marked = page.locator("#prompt-view mark").all_inner_texts()
    assert marked.count("<|im_end|>") == 2, "the user's own is text"
    ask(page, "a <|im_end|> b", tokens=4)
    finish(page)
    _, text = exported(page, "#export-markdown")
    assert text.startswith("# Conversation with gptq-4bit-32g-act-sym\n\n## System\n\nBe brief.")
    assert "\n## You\n\na <|im_end|> b\n\n## Reply\n\n" in text


def test_nothing_jumps_while_a_reply_grows_and_escape_stops_it(page: Page) -> None:
    """The parts around the chat stay where they are; Send's place is taken by Stop."""
    parts = ("#about", "#side", "#chat", "#message", "#status", "#settings", "#more")

    def places() -> tuple[tuple[int, ...], ...]:
        boxes = [page.locator(part).bounding_box() for part in parts]
        assert all(boxes)
        return tuple(
            tuple(round(box[side]) for side in ("x", "y", "width")) for box in boxes if box
        )

    ask(page, "Hello", tokens=4)
    finish(page)
    page.wait_for_timeout(500)
    before = places()
    ask(page, "Hello", tokens=400)
    during = []
    for _ in range(8):
        during.append(places())
        page.wait_for_timeout(150)
    expect(page.locator("#status")).to_contain_text(RUNS)
    page.keyboard.press("Escape")
    finish(page)
    expect(page.locator("#status")).to_contain_text("stopped")
    assert {before, *during, places()} == {before}


def test_the_chat_follows_a_reply_until_somebody_scrolls(page: Page) -> None:
    box = page.locator("#chat .bubble-wrap")
    left = "it => it.scrollHeight - it.clientHeight - it.scrollTop"
    page.set_viewport_size({"width": 1280, "height": 560})
    ask(page, "Hello", tokens=450)
    eventually(lambda: box.evaluate("it => it.scrollTop") > 0, awaited="the chat to scroll")
    page.wait_for_timeout(300)
    assert box.evaluate(left) < 2, "it follows"
    box.hover()
    page.mouse.wheel(0, -20)  # one small step is enough
    page.wait_for_timeout(200)
    stays, shown = box.evaluate("it => it.scrollTop"), len(replies(page)[0])
    eventually(lambda: len(replies(page)[0]) > shown + 100, awaited="more of the reply")
    assert box.evaluate("it => it.scrollTop") == stays
    box.evaluate("it => it.scrollTo(0, it.scrollHeight)")
    page.wait_for_timeout(500)
    assert box.evaluate(left) < 2, "and follows again from the end"
    page.keyboard.press("Escape")
    finish(page)


LONG = [
    "مرحبا، هذا نص عربي مع English.",
    "| Branch | Bits | Group size | Act order | Damping | Dataset |\n|---|---|---|---|---|---|\n"
    "| gptq-4bit-32g-actorder_True | 4 | 32 | yes | 0.1 | wikitext |",
    "```python\nnumbers = [0, 1]  # " + "a long comment " * 20 + "\n```",
    "averylongwordwithoutabreak" * 20,
    r"Inline \(E = mc^2\), and 5 $ or 6 $ of money.",
]


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
def test_a_long_conversation_of_every_kind_stays_in_its_place(
    browser: Browser, server: Server, viewport: dict[str, int]
) -> None:
    key = "0123456789abcdef"
    messages = [
        {"role": role, "content": LONG[i % len(LONG)]}
        for i in range(30)
        for role in ("user", "assistant")
    ]
    with opened(browser, server, viewport=viewport) as (page, errors):
        page.evaluate(
            """([key, messages]) => {
              const value = {key, title: 'Sixty messages', messages}
              localStorage.setItem('gptq-loader/conversation/' + key,
                JSON.stringify({time: 1, value}))
              sessionStorage.setItem('gptq-loader/current', key)
            }""",
            [key, messages],
        )
        page.reload(wait_until="domcontentloaded")
        expect(page.locator("#chat [data-testid=bot]")).to_have_count(30, timeout=30_000)
        box = page.locator("#chat .bubble-wrap")
        left = "it => it.scrollHeight - it.clientHeight - it.scrollTop"
        eventually(lambda: box.evaluate(left) < 2, awaited="the chat to be at its end")
        assert box.evaluate("it => it.scrollWidth - it.clientWidth") <= 1, "nothing is too wide"
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        arabic = page.locator("#chat [data-testid=bot] p").first
        style = arabic.evaluate("it => [getComputedStyle(it).unicodeBidi, it.innerText]")
        assert style == ["plaintext", LONG[0]]
        tall = page.locator("#chat [data-testid=bot] th").first.evaluate("it => it.offsetHeight")
        assert tall < 90, "words of a table are not broken into letters"
        expect(page.locator("#chat .katex").first).to_be_visible()
        assert "5 $ or 6 $" in replies(page)[4]
        assert errors == []


def test_keys_lead_to_what_can_be_seen_alone(page: Page) -> None:
    """No key leads to a part that is not shown, and what has the focus shows it."""
    page.locator("#message textarea").focus()
    for _ in range(24):
        page.keyboard.press("Tab")
        name, visible, outlined = page.evaluate(
            """() => {
              const it = document.activeElement, style = getComputedStyle(it)
              const shown = style.outlineStyle !== 'none' || style.boxShadow !== 'none'
              return [it.outerHTML.slice(0, 120), it.checkVisibility({visibilityProperty: true}),
                it === document.body || shown]
            }"""
        )
        assert visible, name
        assert outlined, name


def test_a_preset_sets_the_numbers(page: Page) -> None:
    page.locator("#preset input").click()
    page.get_by_role("option", name="Deterministic").click()
    expect(page.locator("#temperature input[type=number]")).to_have_value("0")
    page.locator("#preset input").click()
    page.get_by_role("option", name="The checkpoint's own").click()
    page.locator("#sampling button").first.click()
    expect(page.locator("#top_k input")).to_have_value("40")


def test_markup_does_nothing(page: Page) -> None:
    """No script, no address of a script, no form: in a message as in a reply."""
    ask(
        page,
        "<img src=x onerror=document.title='owned'> [go](javascript:document.title='owned')"
        " <form action=/x><input name=y></form>",
        tokens=4,
    )
    finish(page)
    assert page.locator("#chat form, #chat .message img").count() == 0
    links = page.locator("#chat .message a").evaluate_all("them => them.map(it => it.href)")
    assert not [link for link in links if link.startswith("javascript:")]
    expect(page).to_have_title(CHECKPOINT.name)


def test_raw_completes_a_prompt_as_it_was_typed(page: Page) -> None:
    setting = page.locator("#max_new_tokens input")
    setting.fill("12")
    setting.blur()
    page.locator("#temperature input[type=number]").fill("0")
    page.locator("#temperature input[type=number]").blur()
    page.get_by_role("tab", name="Raw").click()
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    page.locator("#raw-prompt textarea").fill(prompt)
    page.locator("#raw-complete").click()
    expect(page.locator("#raw-status")).to_contain_text("cut off", timeout=30_000)
    completed = page.locator("#raw-reply textarea").input_value()
    page.get_by_role("tab", name="Chat").click()
    ask(page, "Hello", tokens=12)
    finish(page)
    page.locator("#more button").first.click()
    _, text = exported(page, "#export-json")
    assert json.loads(text)["messages"][1]["content"] == completed, "the same tokens, typed"
    status = re.search(r"\d+ of 512", page.locator("#status").inner_text())
    assert status
    page.get_by_role("tab", name="Raw").click()
    expect(page.locator("#raw-status")).to_contain_text(f"{status[0]} of the context used")
    page.locator("#raw-append").click()
    expect(page.locator("#raw-prompt textarea")).to_have_value(prompt + completed)
    setting.fill("400")
    setting.blur()
    page.locator("#raw-complete").click()
    expect(page.locator("#raw-status")).to_contain_text(RUNS)
    page.locator("#raw-stop").click()
    expect(page.locator("#raw-status")).to_contain_text("stopped")
    expect(page.locator("#raw-complete")).to_be_visible()
    page.locator("#raw-prompt textarea").fill("word " * 900)
    page.wait_for_timeout(1000)  # gradio drops a click until it has heard that the reply ended
    page.locator("#raw-complete").click()
    expect(page.locator("#raw-problem [role=alert]")).to_contain_text(
        re.compile(r"The prompt has [\d,]+ tokens, and the context is 512\. Shorten")
    )
