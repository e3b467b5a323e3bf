"""LoRA adapters on the page: chosen beside the model's name, in a real browser."""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

import httpx
import pytest
from browsing import (
    CHECKPOINTS,
    ENVIRON,
    MARKS,
    PHONE,
    TOO_WIDE,
    Server,
    ask,
    expect,
    finish,
    load,
    opened,
    replies,
)
from lora_files import write_adapter
from processes import start_server

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

pytestmark = MARKS
pytest.importorskip("uvicorn", reason="the server is not installed")

MODEL, OTHER = "gptq-4bit-32g-act-sym", "gptq-3bit-128g-act-sym"
ALONE = "Base model"
ADAPTERS = ("pirate", "lawyer")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A server of a model with two adapters, and of one without."""
    models = tmp_path / "models"
    for name in (MODEL, OTHER):
        shutil.copytree(CHECKPOINTS / name, models / name)
    adapters = []
    for seed, name in enumerate(ADAPTERS):
        folder = write_adapter(tmp_path / name, models / MODEL, seed=seed)
        adapters += ["--lora", f"{name}={folder}"]
    environ = {
        **os.environ,
        **ENVIRON,
        "GPTQ_LOADER_PLUGINS": f"{ENVIRON['GPTQ_LOADER_PLUGINS']},host-openai",
        "GPTQ_LOADER_CONFIG": str(tmp_path),
        "GPTQ_LOADER_DATA": str(tmp_path),
    }
    command = [sys.executable, "-m", "gptq_loader_plugin", "serve", MODEL, "--dtype", "float32"]
    command += ["--port", "0", "--json", "--models-dir", str(models), *adapters]
    with start_server(command, env=environ) as server:
        yield server.url


def written(address: str, model: str) -> str:
    """Return the API's reply, with the spaces that a page shows."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return " ".join(text.split())


def shown(page: Page) -> str:
    return " ".join(replies(page)[-1].split())


def choose_adapter(page: Page, name: str) -> None:
    page.locator("#adapter input").click()
    page.get_by_role("option", name=name).click()
    expect(page.locator("#adapter input")).to_have_value(name)


def retry(page: Page, adapter: str = "") -> None:
    page.locator("#retry").click()
    words = f"with the adapter {adapter};" if adapter else "of the context used;"
    expect(page.locator("#status")).to_contain_text(words, timeout=30_000)
    finish(page)


def test_a_person_chooses_an_adapter_by_name(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    expected = {name: written(address, name) for name in (MODEL, *ADAPTERS)}
    assert len(set(expected.values())) == 3, "each writes something else"
    served = Server(None, tmp_path, url=address)  # type: ignore[arg-type]  # the fixture's
    with opened(browser, served) as (page, errors):
        expect(page.locator("#adapter input")).to_have_value(ALONE)
        ask(page, "Hello")
        finish(page)
        assert shown(page) == expected[MODEL]
        expect(page.locator("#status")).not_to_contain_text("adapter")
        for name in ADAPTERS:
            choose_adapter(page, name)
            retry(page, name)
            assert shown(page) == expected[name]

        page.reload(wait_until="domcontentloaded")
        expect(page.locator("#adapter input")).to_have_value("lawyer")
        page.get_by_role("tab", name="Model").click()
        page.locator("#reload").click()
        expect(page.locator("#loading")).to_contain_text("Loaded in", timeout=60_000)
        choose_adapter(page, "pirate")
        page.get_by_role("tab", name="Chat").click()
        retry(page, "pirate")
        assert shown(page) == expected["pirate"], "a model that is loaded again has its adapters"
        assert written(address, "lawyer") == expected["lawyer"]

        load(page, OTHER)
        expect(page.locator("#adapter")).to_be_hidden()
        page.get_by_role("tab", name="Chat").click()
        retry(page)
        load(page, MODEL)
        expect(page.locator("#adapter input")).to_have_value(ALONE)
        assert errors == []


def test_the_choice_fits_a_phone(browser: Browser, address: str, tmp_path: Path) -> None:
    served = Server(None, tmp_path, url=address)  # type: ignore[arg-type]  # the fixture's
    with opened(browser, served, viewport=PHONE) as (page, errors):
        choose_adapter(page, "pirate")
        assert page.evaluate(TOO_WIDE) == []
        ask(page, "Hello")
        finish(page)
        expect(page.locator("#status")).to_contain_text("with the adapter pirate")
        assert errors == []


def test_a_second_model_without_the_adapter_writes_with_its_own(
    browser: Browser, address: str, tmp_path: Path
) -> None:
    served = Server(None, tmp_path, url=address)  # type: ignore[arg-type]  # the fixture's
    with opened(browser, served) as (page, errors):
        choose_adapter(page, "pirate")
        page.get_by_role("tab", name="Compare").click()
        page.locator("#other input").click()
        page.get_by_role("option", name=f"{OTHER} (").click()
        expect(page.locator("#other-loading")).to_contain_text("Loaded in", timeout=60_000)
        setting = page.locator("#max_new_tokens input[type=number]")
        setting.fill("8")
        setting.blur()
        page.locator("#compare-message textarea").fill("Hello")
        page.locator("#compare").click()
        for side in ("one", "two"):
            expect(page.locator(f"#status-{side}")).to_contain_text("cut off", timeout=60_000)
        expect(page.locator("#status-one")).to_contain_text("with the adapter pirate")
        expect(page.locator("#status-two")).not_to_contain_text("adapter")
        assert errors == []
