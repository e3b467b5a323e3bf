"""What a person who chats every day expects of the page, in a real browser."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from browsing import (
    DESKTOP,
    MARKS,
    PHONE,
    choose,
    expect,
    finish,
    load,
    opened,
    questions,
    replies,
    send,
)
from waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from browsing import Server
    from playwright.sync_api import Browser, Page

pytestmark = MARKS

FIRST = "gptq-4bit-32g-act-sym"
KEY = "0123456789abcdef"
QUESTION = "Write **C++** with <vector> &lt;b"
CODE = r"""Use `<vector>` and <b>:

```cpp
#include <vector>
int main() { return '\n'; }
```

1. in C:\new
2. \(x\) and &lt;b"""
TALK = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": CODE}]
THOUGHT = "It is easy.\n</think>\n\nTen."


def show(page: Page, messages: list[dict[str, Any]], **more: Any) -> None:
    """Open the page anew with a conversation that this browser has kept."""
    page.evaluate(
        """([key, messages, more]) => {
          const value = {key, title: 'Of C++', messages}
          localStorage.setItem('gptq-loader/conversation/' + key,
            JSON.stringify({time: 1, value, ...more}))
          sessionStorage.setItem('gptq-loader/current', key)
          sessionStorage.removeItem('gptq-loader/panel')
        }""",
        [KEY, messages, more],
    )
    page.reload(wait_until="domcontentloaded")
    expect(page.locator("#chat [data-testid=user]")).to_have_count(
        sum(message["role"] == "user" for message in messages)
    )


def copied(page: Page, index: int) -> str:
    page.get_by_label("Copy message").nth(index).click()
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def say(page: Page, text: str, *, tokens: int = 200) -> None:
    """Have the model reply with a text, to its end."""
    before = page.locator("#chat [data-testid=user]").count()
    send(page, f"say:{text}", tokens=tokens)
    expect(page.locator("#chat [data-testid=user]")).to_have_count(before + 1)
    expect(page.locator("#status")).to_contain_text("of the context used", timeout=30_000)
    expect(page.locator("#send")).to_be_visible(timeout=30_000)


def test_what_was_written_is_shown_copied_and_edited(browser: Browser, server: Server) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    with opened(browser, server, permissions=permissions) as (page, errors):
        show(page, TALK)
        reply = page.locator("#chat [data-testid=bot]")
        expect(reply).to_contain_text("include <vector>")
        expect(reply).to_contain_text(r"in C:\new")
        expect(reply.locator("code .keyword").first).to_be_visible()
        assert (copied(page, 0), copied(page, 1)) == (QUESTION, CODE)
        shown = reply.bounding_box()
        page.get_by_label("Edit", exact=True).last.click()
        box = page.get_by_label("Edit the reply")
        assert box.input_value() == CODE
        size = box.bounding_box()
        assert shown
        assert size
        assert size["width"] >= shown["width"] - 24
        assert box.evaluate("it => it.scrollHeight - it.clientHeight") <= 4, "all of it is seen"
        box.press("Escape")
        expect(box).to_have_count(0)
        page.locator("#message textarea").press("ArrowUp")
        expect(page.get_by_label("Edit the question")).to_have_value(QUESTION)
        page.keyboard.press("Escape")
        say(page, "a <b> & c")
        assert copied(page, 3) == "a <b> & c"
        page.get_by_label("Edit", exact=True).first.click()
        page.get_by_label("Edit the question").fill("say:x")
        page.get_by_label("Edit the question").press("Control+Enter")
        expect(page.locator("#chat [data-testid=user]")).to_have_text(["say:x"])
        page.locator(".said button").click()
        expect(page.locator("#chat [data-testid=user]")).to_have_count(2)
        assert copied(page, 0) == QUESTION
        assert errors == []


def test_the_settings_belong_to_the_conversation(page: Page) -> None:
    page.locator("#system textarea").fill("You are a pirate.")
    temperature = page.locator("#temperature input[type=number]")
    temperature.fill("1.3")
    temperature.blur()
    expect(page.locator("#preset input")).to_have_value("Custom")
    page.locator("#sampling button").first.click()
    page.locator("#stop-strings textarea, #stop-strings input").fill("END")
    page.wait_for_timeout(300)
    page.reload(wait_until="domcontentloaded")
    expect(page.locator("#system textarea")).to_have_value("You are a pirate.")
    expect(temperature).to_have_value("1.3")
    expect(page.locator("#preset input")).to_have_value("Custom")
    say(page, "one END two")
    expect(page.locator("#chat [data-testid=bot]")).to_have_text("one")
    page.locator("#new").click()
    expect(page.locator("#chat [data-testid=bot]")).to_have_count(0)
    page.locator("#system textarea").fill("You are a cook.")
    page.wait_for_timeout(300)
    page.locator("#chats .choose").click()
    expect(page.locator("#chat [data-testid=bot]")).to_have_text("one")
    expect(page.locator("#system textarea")).to_have_value("You are a pirate.")


def test_a_reply_that_a_reload_cut_is_kept_and_goes_on(page: Page) -> None:
    send(page, "say:" + "word " * 60 + "at last", tokens=400)
    expect(page.locator("#status")).to_contain_text(re.compile(r"[4-9]\d tokens"))
    page.reload(wait_until="domcontentloaded")
    expect(page.locator("#status")).to_contain_text("The page was left while this reply was")
    (kept,) = replies(page)
    assert kept.startswith("word word")
    page.locator("#retry").click()  # another one, which keeps what there is
    expect(page.locator("#stop")).to_be_visible()
    page.locator("#stop").click()
    finish(page)
    page.get_by_label("Earlier version").click()
    expect(page.locator("#chat [data-testid=bot]")).to_have_text(kept)
    page.locator("#max_new_tokens input").fill("6")
    page.locator("#max_new_tokens input").blur()
    page.locator("#continue").click()
    expect(page.locator("#status")).to_contain_text("cut off at 6 new tokens (Max new tokens)")
    (longer,) = replies(page)
    assert longer.startswith(kept)
    assert len(longer) > len(kept)
    expect(page.locator("#chat .bar").last).to_contain_text("1/2")
    page.reload(wait_until="domcontentloaded")
    expect(page.locator("#chat [data-testid=bot]")).to_have_text(longer)
    expect(page.locator("#chat .bar").last).to_contain_text("1/2")


def test_a_thought_is_folded_with_its_time_and_can_be_switched_off(empty: Page) -> None:
    choose(empty, "thinker")
    expect(empty.locator("#about h1")).to_have_text("thinker", timeout=120_000)
    empty.get_by_role("tab", name="Chat").click()
    send(empty, f"say:{THOUGHT}", tokens=100)
    summary = empty.locator("#chat summary")
    expect(summary).to_have_text(re.compile(r"Thought for (less than 1|\d+) s"), timeout=30_000)
    thought = empty.locator("#chat details p")
    expect(thought).not_to_be_visible()
    summary.click()
    expect(thought).to_have_text("It is easy.")
    expect(empty.locator("#chat [data-testid=bot]")).to_contain_text("Ten.")
    empty.reload(wait_until="domcontentloaded")
    expect(summary).to_have_text(re.compile("Thought for"))
    expect(thought).not_to_be_visible()
    empty.locator("#message textarea").fill("And?")
    empty.locator("#more button").first.click()
    empty.locator("#show-prompt").click()
    prompt = empty.locator("#prompt-view pre")
    expect(prompt).to_contain_text("<|im_start|>assistant\nTen.<|im_end|>")
    expect(prompt).to_contain_text(re.compile(r"assistant\n<think>\n$"))
    empty.locator("#thinking").get_by_text("Off").click()
    empty.locator("#show-prompt").click()
    expect(prompt).to_contain_text(re.compile(r"<think>\n\n</think>\n\n$"))
    say(empty, "No.")
    expect(empty.locator("#chat [data-testid=bot]").last).to_have_text("No.")
    load(empty, FIRST)
    expect(empty.locator("#thinking")).not_to_be_visible()


def test_files_go_with_a_question_and_conversations_in_and_out(page: Page, tmp_path: Path) -> None:
    notes, picture = tmp_path / "notes.txt", tmp_path / "picture.png"
    notes.write_text("the secret is 42\n")
    picture.write_bytes(b"\x89PNG\x00\x01")
    with page.expect_file_chooser() as chooser:
        page.locator("#attach").click()
    chooser.value.set_files([notes, picture])
    expect(page.locator(".said")).to_contain_text("picture.png is no text file")
    expect(page.locator("#attached")).to_contain_text(re.compile(r"notes\.txt \d+ tokens"))
    send(page, "What is it?", tokens=4)
    finish(page)
    expect(page.locator("#attached li")).to_have_count(0)
    expect(page.locator("#chat [data-testid=user]")).to_contain_text("notes.txt")
    page.locator("#more button").first.click()
    heights = {
        page.locator(f"#{name}").evaluate("it => it.offsetHeight")
        for name in ("show-prompt", "export-json", "export-markdown", "import")
    }
    assert len(heights) == 1, "each in one line"
    with page.expect_download() as download:
        page.locator("#export-json").click()
    written = download.value.path().read_text(encoding="utf-8")
    question = json.loads(written)["messages"][0]["content"]
    assert question == "notes.txt:\n```\nthe secret is 42\n```\n\nWhat is it?"
    page.locator("#new").click()
    expect(page.locator("#chat [data-testid=user]")).to_have_count(0)
    page.locator("#export-json").click()
    expect(page.locator(".said")).to_contain_text("nothing to export")
    for text, shown in (("{}", 0), (written, 1)):
        file = tmp_path / f"conversation-{shown}.json"  # the first may still be read
        file.write_text(text)
        with page.expect_file_chooser() as chooser:
            page.locator("#import").click()
        chooser.value.set_files(file)
        expect(page.locator("#chat [data-testid=user]")).to_have_count(shown)
    assert "the secret is 42" in questions(page)[0]
    expect(page.locator("#chats .choose")).to_have_count(2)


def test_keys_the_dark_and_what_words_mean(page: Page) -> None:
    chat = "document.querySelector('#chat').getBoundingClientRect().top"
    before = page.evaluate(chat)
    page.locator("#why summary").click()
    expect(page.locator("#why pre")).to_be_visible()
    assert page.evaluate(chat) == before, "it lies over the page"
    page.keyboard.press("Escape")
    expect(page.locator("#why pre")).not_to_be_visible()
    chips = page.locator("#about li > span")
    for chip in chips.all():
        chip.focus()
        expect(chip.get_by_role("tooltip")).to_be_visible()
    page.keyboard.press("Control+/")
    expect(page.locator("dialog.keys")).to_contain_text("New chat")
    page.keyboard.press("Escape")
    expect(page.locator("dialog.keys")).not_to_be_visible()
    page.keyboard.press("Control+k")
    expect(page.get_by_label("Search the chats")).to_be_focused()
    page.keyboard.press("Control+b")
    expect(page.locator("#side")).not_to_be_visible()
    page.keyboard.press("Control+b")
    expect(page.locator("#side")).to_be_visible()
    page.keyboard.press("Control+Shift+o")
    expect(page.locator("#message textarea")).to_be_focused()
    page.get_by_label("Switch between light and dark").click()
    expect(page.locator("body")).to_have_class(re.compile("dark"))
    page.reload(wait_until="domcontentloaded")
    expect(page.locator("#about h1")).to_be_visible()
    expect(page.locator("body")).to_have_class(re.compile("dark"))


@pytest.mark.parametrize(("viewport", "share"), [(DESKTOP, 0.6), (PHONE, 0.55)])
def test_the_chat_has_the_room(
    browser: Browser, server: Server, viewport: dict[str, int], share: float
) -> None:
    with opened(browser, server, viewport=viewport) as (page, _):
        show(page, TALK)
        box = page.locator("#chat").bounding_box()
        assert box
        assert box["height"] >= share * viewport["height"]
        typed = page.locator("#message").bounding_box()
        assert typed
        assert typed["y"] + typed["height"] <= viewport["height"], "and what is typed is in sight"
        if viewport == PHONE:
            page.get_by_label("Show or hide the chats").click()
            page.locator("#chats .choose").click()
            expect(page.locator("#side")).not_to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, server: Server, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with opened(browser, server, color_scheme=scheme) as (page, _):
        show(page, [*TALK, {"role": "user", "content": "x"}])
        page.locator("#more button").first.click()
        for name in ("Chat", "Raw", "Compare", "Model"):
            page.get_by_role("tab", name=name).click()
            page.wait_for_timeout(300)
            found = [
                (rule["id"], rule["impact"], [node["html"][:200] for node in rule["nodes"]][:4])
                for rule in axe.run(page).response["violations"]
                if rule["impact"] in ("serious", "critical")
            ]
            assert found == [], name


def test_the_first_load_moves(browser: Browser, registry: Server) -> None:
    """A model's name is at the head at once, and the bar is not still before it has a number."""
    with opened(browser, registry) as (page, _):
        page.get_by_role("tab", name="Model").click()
        if page.locator("#unload").is_enabled():
            page.locator("#unload").click()
            expect(page.locator("#about h1")).to_have_text("No model is loaded")
        page.evaluate(
            """window.seen = new Set(); new MutationObserver(() => {
              window.seen.add(document.querySelector('#about h1').textContent)
              const bar = document.querySelector('#loading progress:not([value])')
              if (bar) window.seen.add(getComputedStyle(bar).animationName)
            }).observe(document.body, {childList: true, subtree: true})"""
        )
        load(page, FIRST)
        seen = page.evaluate("[...window.seen]")
        assert f"Loading {FIRST}" in seen
        assert "working" in seen
        figure = page.locator("#plan .memory")
        free = figure.locator("i.free").evaluate("it => it.clientWidth")
        whole = figure.locator("[role=img]").evaluate("it => it.clientWidth")
        assert free > whole / 2, "a tiny model takes next to nothing of this machine"
        eventually(lambda: page.locator("#facts table").is_visible(), awaited="the facts")
