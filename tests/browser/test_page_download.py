"""The nine steps of a 2023 model card in a real browser, against a hub on this machine."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from browsing import (
    CHECKPOINTS,
    ENVIRON,
    MARKS,
    ask,
    choose,
    expect,
    finish,
    load,
    opened,
    replies,
    started,
)
from hub_server import BRANCHES, REPO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from browsing import Server
    from hub_server import HubServer
    from playwright.sync_api import Browser, Page

pytestmark = MARKS

CHOSEN = "gptq-4bit-128g-actorder_True"
WEIGHTS = "*/resolve/*/*.safetensors"


@pytest.fixture
def mended(hub: HubServer) -> Iterator[HubServer]:
    """The hub, which behaves again afterwards."""
    yield hub
    hub.behave()


def weight_bytes(hub: HubServer, branch: str) -> int:
    return sum(
        file.stat().st_size for file in hub.repos[REPO].branches[branch].glob("*.safetensors")
    )


def open_box(page: Page, text: str) -> None:
    page.get_by_role("tab", name="Model").click()
    page.locator("#download button").first.click()
    page.locator("#repo textarea, #repo input").fill(text)


def test_the_nine_steps_of_a_model_card(
    empty: Page, mended: HubServer, registry: Server, tmp_path: Path
) -> None:
    """Download slowly, cancel, go on, choose, load, save, reload, chat."""
    mended.misbehave(WEIGHTS, slow=weight_bytes(mended, CHOSEN) // 40)
    open_box(empty, REPO)
    empty.locator("#list-branches").click()
    table = empty.locator("#branches table")
    expect(table).to_be_visible(timeout=30_000)
    names = table.locator("tbody th").all_inner_texts()
    assert sorted(names) == sorted(BRANCHES)
    row = table.locator("tbody").nth(names.index(CHOSEN))
    cells = row.locator("td").all_inner_texts()
    assert cells[:3] == ["4", "128", "yes"]
    assert cells[8] == "yes"
    assert re.match(r"needs .* of weights, .* for .* tokens\); cpu has .* GB", cells[10])
    row.locator("td").first.click()
    box = empty.locator("#repo textarea, #repo input")
    expect(box).to_have_value(f"{REPO}:{CHOSEN}")
    expect(row.get_by_role("button")).to_have_attribute("aria-pressed", "true")
    box.fill("owner/another")
    expect(table).to_have_count(0)
    box.fill(f"{REPO}:{CHOSEN}")

    empty.locator("#start").click()
    bar = empty.locator("#downloading progress")
    expect(bar).to_have_attribute("value", re.compile(r"0\.0*[1-9]"))
    moving = re.compile(r"\d+% .* of .*B/s, .* left", re.DOTALL)
    expect(empty.locator("#downloading")).to_contain_text(moving)
    empty.reload(wait_until="domcontentloaded")
    empty.get_by_role("tab", name="Model").click()
    expect(empty.locator("#downloading")).to_contain_text(moving)
    expect(box).to_have_value(f"{REPO}:{CHOSEN}")
    empty.locator("#cancel").click()
    expect(empty.locator("#downloading")).to_contain_text("Stopped. Download resumes from here.")
    mended.behave()
    before = len(mended.requests)
    empty.locator("#start").click()
    expect(empty.locator("#downloading")).to_contain_text("Done: ", timeout=60_000)
    ranges = [sent.range for sent in mended.requests[before:] if sent.path.endswith(".safetensors")]
    assert [part for part in ranges if part and not part.startswith("bytes=0-")], "it resumed"

    empty.locator("#refresh").click()
    load(empty, f"{REPO}:{CHOSEN}")
    expect(empty.locator("#facts")).to_contain_text("128 rows")
    empty.locator("#temperature input[type=number]").fill("0")
    empty.locator("#temperature input[type=number]").blur()
    empty.locator("#save").click()
    expect(empty.locator("#loading")).to_contain_text("Saved for")
    empty.locator("#reload").click()
    expect(empty.locator("#loading")).to_contain_text("Loaded in", timeout=30_000)
    empty.get_by_role("tab", name="Chat").click()
    ask(empty, "What is the capital of France?", tokens=8)
    if os.environ.get("GPTQ_LOADER_BRANCHES"):
        expect(empty.locator("#chat [data-testid=bot]")).to_contain_text("Paris")
    else:
        finish(empty)
    assert len(replies(empty)) == 1
    assert "Traceback" not in registry.log()
    assert "OUTSIDE" not in registry.log()


@pytest.fixture
def with_exllama(
    browser: Browser, mended: HubServer, tmp_path: Path
) -> Iterator[tuple[Page, HubServer]]:
    """A page of a server that knows ExLlama's kernels."""
    environ = {
        "GPTQ_LOADER_PLUGINS": f"{ENVIRON['GPTQ_LOADER_PLUGINS']},kernel-exllama",
        "GPTQ_LOADER_CONFIG": str(tmp_path),
        "GPTQ_LOADER_MODELS": str(tmp_path / "models"),
        **mended.environment(tmp_path / "hf"),
    }
    with (
        started(record=tmp_path / "steps", environ=environ) as served,
        opened(browser, served) as (page, errors),
    ):
        yield page, mended
    assert errors == [], errors


def test_exllamas_column_says_what_was_read_and_no_more(
    with_exllama: tuple[Page, HubServer],
) -> None:
    """The zeros of an asymmetric checkpoint may be any until its files are here."""
    empty, mended = with_exllama
    repo = "owner/asymmetric-GPTQ"
    mended.add(repo, CHECKPOINTS / "gptq_v2-4bit-64g-noact-asym")
    mended.add(repo, CHECKPOINTS / "gptq-3bit-32g-noact-asym", branch="gptq-3bit-32g")
    open_box(empty, repo)

    def column() -> dict[str, str]:
        """List the branches, and read what the column says of each."""
        empty.locator("#list-branches").click()
        table = empty.locator(f"#branches table[data-repo='{repo}']")
        expect(table).to_be_visible(timeout=30_000)
        names = table.locator("tbody th").all_inner_texts()
        cells = [row.locator("td").nth(7).inner_text() for row in table.locator("tbody").all()]
        return dict(zip(names, cells, strict=True))

    assert column() == {"main": "perhaps", "gptq-3bit-32g": "no"}, "3 bits it never takes"
    empty.locator("#start").click()
    expect(empty.locator("#downloading")).to_contain_text("Done: ", timeout=60_000)
    empty.locator("#refresh").click()
    choose(empty, f"{repo}:main")
    expect(empty.locator("#loading")).to_contain_text("Loaded in", timeout=120_000)
    read = empty.locator("#facts tr", has_text="ExLlama").locator("td").first.inner_text()
    assert read.split(":")[0] in ("yes", "no")
    empty.locator("#repo textarea, #repo input").fill("")
    empty.locator("#repo textarea, #repo input").fill(repo)
    empty.locator("#list-branches").click()
    main = empty.locator(f"#branches table[data-repo='{repo}'] tbody").first
    expect(main.locator("th")).to_have_text("main")
    # both read the zeros that are here
    expect(main.locator("td").nth(7)).to_have_text(read.split(":")[0], timeout=30_000)


@pytest.mark.parametrize("how", ["cut", "reset"])
def test_a_connection_that_breaks_is_taken_up_again(
    empty: Page, mended: HubServer, registry: Server, how: str
) -> None:
    """Twice broken after some bytes: the page goes on by itself, from where it was."""
    branch = {"cut": "gptq-4bit-32g-actorder_True", "reset": "gptq-3bit--1g-actorder_True"}[how]
    mended.misbehave(WEIGHTS, times=2, **{how: weight_bytes(mended, branch) // 3})
    before = len(mended.requests)
    open_box(empty, f"{REPO}:{branch}")
    empty.locator("#start").click()
    expect(empty.locator("#downloading")).to_contain_text("Done: ", timeout=90_000)
    ranges = [sent.range for sent in mended.requests[before:] if sent.path.endswith(".safetensors")]
    assert [part for part in ranges if part and not part.startswith("bytes=0-")], "it resumed"
    load(empty, f"{REPO}:{branch}")
    assert "Traceback" not in registry.log()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"status": 403, "error": "GatedRepo"}, "gated"),
        ({"flip": 50_000}, "hash"),
    ],
)
def test_a_failing_hub_is_explained(
    empty: Page, mended: HubServer, registry: Server, how: dict[str, Any], words: str
) -> None:
    branch = "gptq-3bit-128g-actorder_True"
    mended.misbehave(WEIGHTS, **how)
    open_box(empty, f"{REPO}:{branch}")
    empty.locator("#start").click()
    alert = empty.locator("#downloading [role=alert]")
    expect(alert).to_contain_text(words, timeout=60_000)
    expect(empty.locator("#start")).to_be_enabled()
    assert "Traceback" not in registry.log()


def test_what_is_not_a_repository_is_not_requested(empty: Page, mended: HubServer) -> None:
    for text in ("../../etc/passwd", "/etc", "owner/../x", "nothing", "a/b:../c", "a/b\x00c"):
        open_first = empty.locator("#repo").is_visible()
        if not open_first:
            open_box(empty, text)
        empty.locator("#repo textarea, #repo input").fill(text)
        before = len(mended.requests)
        empty.locator("#start").click()
        expect(empty.locator("#downloading [role=alert]")).to_contain_text("is not a repository")
        assert len(mended.requests) == before
    empty.locator("#repo textarea, #repo input").fill("owner/nothing-here")
    empty.locator("#list-branches").click()
    expect(empty.locator("#downloading [role=alert]")).to_contain_text("owner/nothing-here")
