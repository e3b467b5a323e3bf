"""The page and the API of one server: one model behind both, in a real browser."""

from __future__ import annotations

import json
import os
import shutil
import sys
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from browsing import CHECKPOINTS, ENVIRON, MARKS, Server, ask, expect, finish, load, opened, replies
from processes import start_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

pytestmark = MARKS
pytest.importorskip("uvicorn", reason="the server is not installed")

FIRST, SECOND = "gptq-4bit-32g-act-sym", "gptq-3bit-128g-act-sym"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    models = tmp_path / "models"
    for name in (FIRST, SECOND):
        shutil.copytree(CHECKPOINTS / name, models / name)
    plugins = f"{ENVIRON['GPTQ_LOADER_PLUGINS']},host-openai"
    environ = {
        **os.environ,
        **ENVIRON,
        "GPTQ_LOADER_PLUGINS": plugins,
        "GPTQ_LOADER_CONFIG": str(tmp_path),
        "GPTQ_LOADER_DATA": str(tmp_path),
    }
    command = [sys.executable, "-m", "gptq_loader_plugin", "serve", "--port", "0", "--json"]
    with start_server([*command, "--models-dir", models], env=environ) as server:
        yield server.url


def call(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{address}{path}", data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def compare_and_measure(page: Page) -> None:
    """Each side's reply goes to its own end, and each side is measured."""
    page.get_by_role("tab", name="Compare").click()
    page.locator("#other input").click()
    page.get_by_role("option", name=f"{FIRST} (").click()
    expect(page.locator("#other-loading")).to_contain_text("Loaded in", timeout=30_000)
    page.locator("#compare-message textarea").fill("Hello")
    page.locator("#compare").click()
    for side in ("one", "two"):
        expect(page.locator(f"#status-{side}")).to_contain_text("cut off", timeout=30_000)
    page.locator("#measure").click()
    expect(page.locator("#measuring")).to_contain_text("Measured: ", timeout=30_000)
    expect(page.locator("#chart .mark")).to_have_count(2)


def test_page_and_api_share_a_model(browser: Browser, address: str, tmp_path: Path) -> None:
    served = Server(None, tmp_path, url=address)  # type: ignore[arg-type]  # the fixture's
    with opened(browser, served) as (page, errors):
        expect(page.locator("#about h1")).to_have_text("No model is loaded")
        load(page, FIRST)
        page.get_by_role("tab", name="Chat").click()
        ask(page, "Hello", tokens=8)
        finish(page)
        body = {
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 8,
            "temperature": 0,
        }
        got = call(address, "/v1/chat/completions", {"model": FIRST, **body})
        written = got["choices"][0]["message"]["content"]
        assert " ".join(written.split()) == " ".join(replies(page)[0].split())
        call(address, "/v1/chat/completions", {"model": SECOND, **body})
        page.locator("#retry").click()
        expect(page.locator("#about h1")).to_have_text(SECOND)
        finish(page)
        compare_and_measure(page)
        page.get_by_role("tab", name="Model").click()
        expect(page.locator("#no-downloads")).to_contain_text("--allow-downloads")
        page.locator("#unload").click()
        expect(page.locator("#about h1")).to_have_text("No model is loaded")
        assert errors == []
    names = [model["id"] for model in call(address, "/v1/models")["data"]]
    assert sorted(names) == sorted((FIRST, SECOND))
