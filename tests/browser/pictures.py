"""Take the docs' pictures of the page, with the demo in it: python tests/browser/pictures.py [DIR].

Needs Chromium, and the demo, which `make demo` prepares. `--look` takes every tab in every width,
light and dark, to be looked at: python tests/browser/pictures.py --look DIR.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from browsing import CHECKPOINTS, CHROMIUM, expect, opened, playwright, started
from hub_server import BRANCHES, REPO, HubServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from browsing import Server
    from playwright.sync_api import Browser, Page

DOCS = Path(__file__).parents[2] / "docs"
QUESTIONS = (
    "What is the capital of France?",
    "Give me three tips for a good night's sleep.",
    "Write a C++ function that adds two numbers.",
)
PLUGINS = (
    "core,host-gradio,host-openai,kernel-cpu,kernel-dense,kernel-exllama,kernel-reference,"
    "kernel-torch"
)
# As the cards of 2023 describe their branches.
CARD = """---
license: apache-2.0
---

| Branch | Bits | GPTQ Dataset | Seq Len | Desc |
| ------ | ---- | ------------ | ------- | ---- |
"""
DESCRIBED = {
    "main": (4, "With Act Order. No group size, to lower VRAM requirements."),
    "gptq-4bit-32g-actorder_True": (4, "The highest possible quality, with maximum VRAM usage."),
    "gptq-4bit-64g-actorder_True": (4, "Less VRAM than 32g, with slightly lower accuracy."),
    "gptq-4bit-128g-actorder_True": (4, "Less VRAM than 64g, with slightly lower accuracy."),
    "gptq-3bit--1g-actorder_True": (3, "No group size. Lowest possible VRAM requirements."),
    "gptq-3bit-128g-actorder_True": (3, "3-bit with group size 128g: better than without."),
}
ROW = "| [{name}](https://example.org/{name}) | {bits} | wikitext | 2048 | {text} |\n"
WIDTHS = ((390, 844), (1024, 768), (1440, 900), (1920, 1080))
LOADS = 120_000  # milliseconds: the first load imports torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=DOCS)
    parser.add_argument("--look", action="store_true", help="every tab, width and scheme")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made, HubServer() as hub:
        folder = Path(made)
        rows = [ROW.format(name=it, bits=bits, text=text) for it, (bits, text) in DESCRIBED.items()]
        for branch, name in BRANCHES.items():
            shutil.copytree(CHECKPOINTS / name, folder / "hub" / branch)
            (folder / "hub" / branch / "README.md").write_text("".join([CARD, *rows]))
            hub.add(REPO, folder / "hub" / branch, branch=branch)
        environ = {
            "GPTQ_LOADER_CONFIG": made,
            "GPTQ_LOADER_MODELS": str(folder / "models"),
            "GPTQ_LOADER_PLUGINS": PLUGINS,
            "STEP_SECONDS": "0",
            **hub.environment(folder / "hf"),
        }
        with (
            playwright.sync_playwright() as play,
            started("demo", record=folder / "steps", environ=environ) as server,
        ):
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            take = look if arguments.look else take_for_docs
            for name in take(browser, server, arguments.folder):
                sys.stdout.write(f"{name}\n")
                sys.stdout.flush()
            browser.close()


def take_for_docs(browser: Browser, server: Server, folder: Path) -> Iterator[Path]:
    """Take the docs' pictures, and yield each one's file."""
    with opened(browser, server) as (page, _):
        talk(page)
        yield picture(page, folder / "page.png")
        page.get_by_label("Switch between light and dark").click()
        rest(page)
        yield picture(page, folder / "page-dark.png")
        page.set_viewport_size({"width": 390, "height": 844})
        yield picture(page, folder / "page-phone.png")
    for name, show, height in (
        ("raw", complete, 800),
        ("model", show_model, 1000),
        ("download", list_branches, 1300),
        ("compare", compare, 1250),
    ):
        with opened(browser, server, viewport={"width": 1280, "height": height}) as (page, _):
            show(page)
            yield picture(page, folder / f"page-{name}.png")


def look(browser: Browser, server: Server, folder: Path) -> Iterator[Path]:
    """Take every tab in every width, light and dark, and yield each one's file."""
    tabs = {
        "chat": talk,
        "raw": complete,
        "model": show_model,
        "download": list_branches,
        "compare": compare,
    }
    for tab, show in tabs.items():
        with opened(browser, server) as (page, _):
            show(page)
            for scheme in ("light", "dark"):
                for width, height in WIDTHS:
                    page.set_viewport_size({"width": width, "height": height})
                    file = folder / f"{tab}-{scheme}-{width}.png"
                    yield picture(page, file, full_page=tab != "chat")
                page.set_viewport_size({"width": 1280, "height": 800})
                page.get_by_label("Switch between light and dark").click()


def picture(page: Page, file: Path, **options: Any) -> Path:
    rest(page)
    page.screenshot(path=file, animations="disabled", **options)
    return file


def rest(page: Page) -> None:
    """Let go of what was pressed, so that nothing shows as pointed at."""
    page.mouse.move(2, 2)
    page.evaluate("document.activeElement?.blur(); scrollTo(0, 0)")
    page.wait_for_timeout(400)


def settle(page: Page, *, tokens: int) -> None:
    page.locator("#preset input").click()
    page.get_by_role("option", name="Deterministic").click()
    limit = page.locator("#max_new_tokens input")
    limit.fill(str(tokens))
    limit.blur()


def talk(page: Page) -> None:
    settle(page, tokens=160)
    for i, question in enumerate(QUESTIONS):
        if i:
            page.locator("#new").click()
            expect(page.locator("#chat [data-testid=bot]")).to_have_count(0)
        page.locator("#message textarea").fill(question)
        page.locator("#message textarea").press("Enter")
        expect(page.locator("#status")).to_contain_text("context used", timeout=LOADS)
        expect(page.locator("#send")).to_be_visible(timeout=LOADS)
    expect(page.locator("#chat code .keyword").first).to_be_visible()


def complete(page: Page) -> None:
    settle(page, tokens=24)
    page.get_by_role("tab", name="Raw").click()
    page.locator("#raw-prompt textarea").fill("The capital of France is")
    page.locator("#raw-complete").click()
    expect(page.locator("#raw-status")).to_contain_text("context used", timeout=LOADS)


def show_model(page: Page) -> None:
    page.get_by_role("tab", name="Model").click()
    expect(page.locator("#facts table")).to_be_visible(timeout=LOADS)
    expect(page.locator("#plan .memory")).to_be_visible(timeout=LOADS)


def list_branches(page: Page) -> None:
    page.get_by_role("tab", name="Model").click()
    page.locator("#download button").first.click()
    page.locator("#repo textarea, #repo input").fill(REPO)
    page.locator("#list-branches").click()
    expect(page.locator("#branches table")).to_be_visible(timeout=LOADS)
    page.locator("#branches [data-branch]").nth(1).click()


def compare(page: Page) -> None:
    settle(page, tokens=60)
    page.get_by_role("tab", name="Compare").click()
    page.locator("#other input").click()
    page.get_by_role("option", name=re.compile("demo|SmolLM2")).first.click()
    expect(page.locator("#other-loading")).to_contain_text("Loaded in", timeout=LOADS)
    page.locator("#compare-message textarea").fill("What is a hash table?")
    page.locator("#compare").click()
    for side in ("one", "two"):
        status = page.locator(f"#status-{side}")
        expect(status).to_contain_text("context used", timeout=LOADS)


if __name__ == "__main__":
    main()
