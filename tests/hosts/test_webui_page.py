"""text-generation-webui's page, driven over Gradio's queue: the Model tab with our loader in it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from environments import branches, needs_python_of, python_of
from processes import run_process
from waiting import eventually
from webui_process import WEBUI, Page, Webui

if TYPE_CHECKING:
    from collections.abc import Iterator

DATA = Path(__file__).parents[1] / "data" / "checkpoints"
ONE = (branches() or [DATA / "gptq-4bit-32g-act-sym"])[0]
NAME = "GPTQ (gptq_loader_plugin)"
OWN = ["llama.cpp", "Transformers", "ExLlamav3_HF", "ExLlamav3", "TensorRT-LLM"]
GRADIO = "import gradio; gradio.Headless"


def has_page() -> bool:
    python = python_of("webui")
    if python is None:
        return False
    return run_process([python, "-c", GRADIO]).returncode == 0


pytestmark = [
    pytest.mark.host("webui"),
    pytest.mark.skipif(
        not (WEBUI / "server.py").is_file(),
        reason="WEBUI_DIR names no checkout of text-generation-webui",
    ),
    needs_python_of("webui"),
    pytest.mark.skipif(
        not has_page(), reason="the environment webui lacks text-generation-webui's own Gradio"
    ),
]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Webui]:
    """The host with its page, and ours as an extension."""
    from importlib.resources import files

    folder = tmp_path_factory.mktemp("page")
    made = Webui(folder, ["--extensions", "gptq_loader"], ours=False)
    extension = made.user_data / "extensions" / "gptq_loader"
    extension.mkdir(parents=True)
    script = files("gptq_loader_extensions.webui").joinpath("script.py").read_text()
    (extension / "script.py").write_text(script)
    made.add(ONE)
    made.add(DATA / "base")
    with made:
        yield made


@pytest.fixture
def page(host: Webui) -> Page:
    return Page(host)


def load(page: Page) -> str:
    """Press Load, the button beside the list of models; return the page's texts."""
    page.press(page.button_after("Model", "Load"))
    return page.all_values()


def test_the_loader_is_in_both_lists_after_the_hosts_own(page: Page) -> None:
    assert page.choices("Model loader") == [*OWN, NAME]
    assert page.choices("Filter by loader") == ["All", *OWN, NAME]
    assert "auto" in page.choices("gptq-backend")
    assert {"auto", "chatml", "card", "checkpoint"} <= set(page.choices("gptq-template"))


def test_the_controls_stand_in_the_model_tab_below_the_list_of_loaders(page: Page) -> None:
    def inside(node: dict, ids: list[int]) -> list[int]:
        ids.append(node["id"])
        for child in node.get("children") or ():
            inside(child, ids)
        return ids

    def tab_of(node: dict) -> dict | None:
        if page.components.get(node["id"], {}).get("props", {}).get("elem_id") == "model-tab":
            return node
        return next((it for child in node.get("children") or () if (it := tab_of(child))), None)

    tab = tab_of(page.layout)
    assert tab is not None
    order = inside(tab, [])
    ours = [page.find(it) for it in ("gptq-backend", "gptq-template")]
    assert order.index(page.find("Model loader")) < order.index(ours[0]) < order.index(ours[1])
    assert order.index(ours[1]) < order.index(page.find("gptq-explain", "html"))
    assert order.index(ours[1]) < order.index(page.find("attn-implementation"))


def test_choosing_a_model_shows_the_controls_and_the_kernels(page: Page) -> None:
    page.set("Model", ONE.name)
    assert page.value("Model loader") == NAME
    for label, kind in (("gptq-backend", "dropdown"), ("gptq-explain", "html")):
        assert page.components[page.find(label, kind)]["props"]["visible"]
    page.set("gptq-backend", "reference")
    assert "reference (all " in page.value("gptq-explain", "html")
    page.set("gptq-backend", "exllama")
    assert "needs a CUDA or ROCm GPU" in page.value("gptq-explain", "html")
    page.set("Model", "base")
    assert page.value("Model loader") == "Transformers"
    assert not page.components[page.find("gptq-backend")]["props"]["visible"]


def test_load_chat_save_and_reload(host: Webui, page: Page) -> None:
    page.set("Model", ONE.name)
    page.set("gptq-backend", "reference")
    assert f"Successfully loaded `{ONE.name}`." in load(page)
    assert "reference (all " in host.log().rpartition("KERNELS:")[2]
    text, usage = host.complete("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n", 8)
    assert text
    assert usage["completion_tokens"] <= 8
    page.press(page.find("Save settings", "button"))
    saved = yaml.safe_load((host.models / "config-user.yaml").read_text())[f"{ONE.name}$"]
    assert saved["gptq_backend"] == "reference"
    assert saved["gptq_template"] == "auto"
    assert saved["gptq_context"] == 0
    assert "loader" not in saved, "without us, the host could not load it by another one"
    assert host.load(ONE.name) == NAME
    assert "reference (all " in host.log().rpartition("KERNELS:")[2], "by the API too"
    fresh = Page(host)
    fresh.set("Model", "base")
    assert "Successfully loaded `base`." in load(fresh), "over the one before"
    assert host.get("/v1/internal/model/info")["loader"] == "Transformers"
    fresh.set("Model", ONE.name)
    assert fresh.value("gptq-backend") == "reference"
    assert f"Successfully loaded `{ONE.name}`." in load(fresh)
    fresh.press(fresh.button_after("Model", "Unload"))
    assert host.get("/v1/internal/model/info")["model_name"] == "None"
    (host.models / "config-user.yaml").unlink()


def test_a_load_that_fails_is_explained(host: Webui, page: Page) -> None:
    page.set("Model", ONE.name)
    page.set("gptq-backend", "triton")
    status = load(page)
    assert "### The model could not be loaded" in status
    assert "triton cannot run here: needs a CUDA or ROCm GPU; this is cpu" in status
    assert "**Hint:** set gptq-backend to auto" in status
    assert host.get("/v1/internal/model/info")["model_name"] == "None"
    assert "['min_p']" not in host.log()
    assert "Traceback" not in status
    page.set("gptq-backend", "auto")
    assert f"Successfully loaded `{ONE.name}`." in load(page)


def test_the_context_of_the_page_is_the_loaded_models(page: Page) -> None:
    page.set("Model", ONE.name)
    page.set("gptq-context", 300, "number")
    assert f"Successfully loaded `{ONE.name}`." in load(page)
    assert page.value("Truncate the prompt up to this length", "number") == 300
    page.set("gptq-context", 0, "number")


def test_a_restart_of_the_page_keeps_everything_once(host: Webui, page: Page) -> None:
    page.set("Model", ONE.name)
    load(page)
    with contextlib.suppress(OSError):  # it restarts while it answers
        page.press(page.find("Apply flags/extensions and restart", "button"))
    eventually(
        lambda: host.log().count("Running on local URL") == 2,
        seconds=120,
        awaited="the page to start again",
        log=host.log,
    )
    again = Page(host)
    assert again.choices("Model loader") == [*OWN, NAME]
    assert sum(it["props"].get("label") == "gptq-backend" for it in again.components.values()) == 1
    again.set("Model", ONE.name)
    assert f"Successfully loaded `{ONE.name}`." in load(again)
    assert host.log().count('Loading the extension "gptq_loader"') == 2


def test_it_starts_with_a_page_and_a_model(tmp_path: Path) -> None:
    made = Webui(tmp_path, ["--model", ONE.name])
    shutil.copytree(ONE, made.models / ONE.name)
    with made:
        page = Page(made)
        assert page.choices("Model loader") == [*OWN, NAME]
        assert made.get("/v1/internal/model/info")["loader"] == NAME
        assert "kernels" in page.value("gptq-explain", "html")
