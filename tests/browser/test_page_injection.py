"""Names and cards that are markup: the page shows them as text, and runs none of it."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest
from browsing import CHECKPOINTS, MARKS, expect, opened, started
from hub_server import HubServer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from browsing import Server
    from playwright.sync_api import Browser, Page

pytestmark = MARKS

RUNS = "window.owned=(window.owned||0)+1"
IMAGE = f"<img src=x onerror={RUNS}>"  # what a folder can be called: no slash
NAME = f"model {IMAGE}"
BRANCH = f"b{IMAGE}".replace(" ", "\N{NO-BREAK SPACE}")
REPO = "owner/model-GPTQ"
MARKUP = [
    IMAGE,
    f"<svg/onload={RUNS}>",
    f"<script>{RUNS}</script>",
    f"<details open ontoggle={RUNS}>x</details>",
    f'<iframe srcdoc="<script>parent.{RUNS}</script>"></iframe>',
    f"[a link](javascript:{RUNS})",
    f"<a href='javascript:{RUNS}' id=link>x</a>",
    f"</textarea></pre></code>{IMAGE}",
    f"```\n</code></pre>{IMAGE}\n```",
    f"&lt;img src=x onerror={RUNS}&gt;",
    f"$$\\href{{javascript:{RUNS}}}{{x}}$$",
    f"<style>@import 'x'</style><form><input autofocus onfocus={RUNS}></form>",
]
CARD = "---\nlicense: '{}'\n---\n{}\n".format(IMAGE, "\n\n".join(MARKUP))


def hostile(folder: Path) -> None:
    """Make a checkpoint whose every text is markup."""
    shutil.copytree(CHECKPOINTS / "gptq-4bit-32g-act-sym", folder)
    (folder / "README.md").write_text(CARD)
    config = json.loads((folder / "config.json").read_text())
    config["_name_or_path"] = config["quantization_config"]["model_name_or_path"] = IMAGE
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("injection")
    hostile(folder / "models" / NAME)
    (folder / "models" / f"damaged {IMAGE}").mkdir()
    (folder / "models" / f"damaged {IMAGE}" / "model.safetensors").write_bytes(b"<b>no</b>")
    (folder / "models" / f"damaged {IMAGE}" / "config.json").write_text(
        json.dumps({"model_type": IMAGE, "quantization_config": {"quant_method": "gptq"}})
    )
    with HubServer() as hub:
        hub.add(REPO, folder / "models" / NAME)
        hub.add(REPO, folder / "models" / NAME, branch=BRANCH)
        environ = {
            "GPTQ_LOADER_CONFIG": str(folder / "config"),
            "GPTQ_LOADER_MODELS": str(folder / "models"),
            **hub.environment(folder / "hf"),
        }
        with started(record=folder / "steps", environ=environ) as served:
            yield served


def nothing_ran(page: Page) -> None:
    """See that no markup became an element, nor ran when its links were pressed."""
    page.wait_for_timeout(500)
    assert page.evaluate("window.owned") is None
    links = page.evaluate(
        "[...document.querySelectorAll('a[href^=javascript i], img[src=x], main iframe')]"
        ".map(it => it.outerHTML)"
    )
    assert links == []


def test_nothing_of_a_folder_runs(browser: Browser, server: Server) -> None:
    with opened(browser, server) as (page, _):
        page.get_by_role("tab", name="Model").click()
        for name in (f"damaged {IMAGE}", NAME):
            page.locator("#model input").click()
            page.get_by_role("option", name=name).first.click()
            expect(page.locator("#loading")).not_to_be_empty(timeout=120_000)
            page.wait_for_timeout(1000)
            nothing_ran(page)


def test_nothing_of_a_repository_runs(browser: Browser, server: Server) -> None:
    with opened(browser, server) as (page, _):
        page.get_by_role("tab", name="Model").click()
        page.locator("#download button").first.click()
        for repository in (REPO, IMAGE, f"owner/{IMAGE}", f"{REPO}:{IMAGE}"):
            page.locator("#repo textarea, #repo input").fill(repository)
            page.locator("#list-branches").click()
            if repository == REPO:
                expect(page.locator("#branches table")).to_contain_text("onerror", timeout=60_000)
            page.wait_for_timeout(2000)
            nothing_ran(page)
