"""The servers and the browser that all of these tests share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browsing import CHECKPOINT, CHECKPOINTS, CHROMIUM, opened, playwright, started
from hub_server import BRANCHES, REPO, HubServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from browsing import Server
    from playwright.sync_api import Browser, Page

# As Qwen3's: a thought is opened unless it is switched off, and left out of earlier turns.
THINKS = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.reasoning_content and loop.last %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% else %}<think>
{% endif %}{% endif %}"""
CHOICE = ("gptq-4bit-32g-act-sym", "gptq-3bit-128g-act-sym", "gptq_v2-8bit-32g-act-asym")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A page with a model in it."""
    folder = tmp_path_factory.mktemp("page")
    environ = {"GPTQ_LOADER_CONFIG": str(folder), "GPTQ_LOADER_MODELS": str(folder)}
    with started(CHECKPOINT, record=folder / "steps", environ=environ) as served:
        yield served


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models directory, with a damaged checkpoint among the good ones, and one that thinks."""
    folder = tmp_path_factory.mktemp("models")
    for name in CHOICE:
        shutil.copytree(CHECKPOINTS / name, folder / name)
    shutil.copytree(CHECKPOINTS / CHOICE[0], folder / "damaged")
    shutil.copytree(CHECKPOINTS / CHOICE[0], folder / "thinker")
    (folder / "thinker" / "chat_template.jinja").write_text(THINKS)
    weights = next((folder / "damaged").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the settings that the page saves."""
    return tmp_path_factory.mktemp("config")


@pytest.fixture(scope="session")
def hub() -> Iterator[HubServer]:
    """A model hub with a repository of six branches."""
    real = os.environ.get("GPTQ_LOADER_BRANCHES")
    with HubServer() as server:
        for branch, name in BRANCHES.items():
            folder = Path(real) / branch if real else CHECKPOINTS / name
            server.add(REPO, folder, branch=branch)
        yield server


@pytest.fixture(scope="session")
def registry(
    models: Path, config: Path, hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A page without a model, which loads those of the models directory and of the hub."""
    folder = tmp_path_factory.mktemp("registry")
    environ = {
        "GPTQ_LOADER_CONFIG": str(config),
        "GPTQ_LOADER_MODELS": str(models),
        **hub.environment(folder / "hf"),
    }
    with started(record=folder / "steps", environ=environ) as served:
        yield served


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    """The page with a model, with a console that must stay free of errors."""
    with opened(browser, server) as (fresh, errors):
        yield fresh
    assert errors == [], errors


@pytest.fixture
def empty(browser: Browser, registry: Server) -> Iterator[Page]:
    """The page that began without a model, with a console that must stay free of errors."""
    with opened(browser, registry) as (fresh, errors):
        yield fresh
    assert errors == [], errors
