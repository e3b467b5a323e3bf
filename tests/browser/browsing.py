"""Drive the page in a real browser: start a server, open the page, send a message."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from processes import start_process
from waiting import eventually, join

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from playwright.sync_api import Browser, Page

pytest.importorskip("gradio", reason="gradio is not installed")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
expect.set_options(timeout=15_000)  # a machine that runs other tests beside these is slow

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
CHECKPOINT = CHECKPOINTS / "gptq-4bit-32g-act-sym"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
# The same kernels whatever else is installed.
ENVIRON = {
    "GPTQ_LOADER_PLUGINS": "core,host-gradio,kernel-cpu,kernel-dense,kernel-reference",
    "OMP_NUM_THREADS": "1",
}
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
LEFT = ("AbortError: ", "Unexpected error Connection errored out")
ENDED = re.compile(r"cut off|stopped")
RUNS = re.compile(r"\d tokens, [\d.]+ a second")
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium; apt-get install chromium"),
]
# What ends right of the window, other than inside what scrolls by itself.
TOO_WIDE = """[...document.querySelectorAll('main *')].filter(it => {
  if (it.getBoundingClientRect().right <= innerWidth + 1) return false
  for (let up = it.parentElement; up; up = up.parentElement)
    if (up.matches('#why pre, #about ul, .bubble-wrap, .scrolls, .tab-container, .carrier'))
      return false
  return true
}).map(it => it.outerHTML.slice(0, 200))"""


@dataclass
class Server:
    process: subprocess.Popen[str]
    record: Path
    url: str = ""
    lines: list[str] = field(default_factory=list)
    forgotten: int = 0

    def steps(self) -> int:
        return self.record.stat().st_size if self.record.exists() else 0

    def log(self) -> str:
        return "".join(self.lines[self.forgotten :])

    def forget_log(self) -> None:
        self.forgotten = len(self.lines)


@contextmanager
def started(*arguments: object, record: Path, environ: Mapping[str, str]) -> Iterator[Server]:
    """Start page_server.py, and end it as Ctrl-C does."""
    command = [sys.executable, Path(__file__).with_name("page_server.py"), record, *arguments]
    environ = {**ENVIRON, "GPTQ_LOADER_DATA": str(record.parent / "data"), **environ}
    with start_process(
        command, env={**os.environ, **environ}, stdout=subprocess.DEVNULL
    ) as process:
        served = Server(process, record)
        assert process.stderr is not None
        stderr = process.stderr
        reader = threading.Thread(target=lambda: served.lines.extend(stderr))
        reader.start()

        def address() -> str:
            assert process.poll() is None, served.log()
            line = re.search(r"Open (\S+)", served.log())
            return line[1] if line else ""

        try:
            served.url = eventually(address, seconds=120, awaited="the page", log=served.log)
            yield served
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            finally:
                process.kill()
                join(reader)


class opened:  # noqa: N801 - a context manager
    """One browser with the page in it, and what its console complains of."""

    def __init__(self, browser: Browser, server: Server, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": DESKTOP, **options})
        self.url = server.url

    def __enter__(self) -> tuple[Page, list[str]]:
        errors: list[str] = []
        fresh = self.context.new_page()
        # a page that is left ends what gradio was reading: gradio does not catch that, or tells it
        fresh.on(
            "console",
            lambda message: (
                message.type != "error"
                or message.text.startswith(LEFT)
                or errors.append(message.text)
            ),
        )
        fresh.on("pageerror", lambda error: error.name == "AbortError" or errors.append(str(error)))
        fresh.goto(self.url, wait_until="domcontentloaded")
        expect(fresh.locator("#about h1")).to_be_visible(timeout=60_000)
        return fresh, errors

    def __exit__(self, *_: object) -> None:
        self.context.close()


def send(page: Page, text: str, *, tokens: int = 8) -> None:
    """Send a message, with settings under which this model talks on to the limit."""
    for name, value in (("temperature", 0), ("max_new_tokens", tokens)):
        setting = page.locator(f"#{name} input[type=number]")
        setting.fill(str(value))
        setting.blur()
    page.locator("#message textarea").fill(text)
    page.locator("#message textarea").press("Enter")


def ask(page: Page, text: str, *, tokens: int = 8) -> None:
    """Send a message, and see its reply begin."""
    before = len(questions(page))
    send(page, text, tokens=tokens)
    expect(page.locator("#chat [data-testid=user]")).to_have_count(before + 1)


def finish(page: Page) -> None:
    """See the reply end."""
    expect(page.locator("#status")).to_contain_text(ENDED, timeout=30_000)
    expect(page.locator("#send")).to_be_visible()


def replies(page: Page) -> list[str]:
    texts: list[str] = page.locator("#chat [data-testid=bot]").all_inner_texts()
    return texts


def questions(page: Page) -> list[str]:
    texts: list[str] = page.locator("#chat [data-testid=user]").all_inner_texts()
    return [text.strip() for text in texts]


def choose(page: Page, name: str) -> None:
    """Choose a model in the list, as a person does."""
    page.get_by_role("tab", name="Model").click()
    page.locator("#model input").click()
    page.get_by_role("option", name=f"{name} (").click()


def load(page: Page, name: str) -> None:
    """Choose a model, and see it loaded."""
    choose(page, name)
    # the first load of a server imports torch
    expect(page.locator("#about h1")).to_have_text(name, timeout=120_000)
    expect(page.locator("#loading")).to_contain_text("Loaded in", timeout=30_000)
