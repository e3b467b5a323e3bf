"""The ids of the page's elements are the same in Python, in the style sheet and in the script."""

from __future__ import annotations

import gc
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import gptq_loader_plugin as gptq
from gptq_loader_extensions.gradio import elements
from gptq_loader_extensions.gradio.jobs.local_models import LocalModels
from gptq_loader_extensions.gradio.jobs.models import Loaded

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "extensions" / "gptq_loader_extensions" / "gradio"
CHECKPOINT = ROOT / "tests" / "data" / "checkpoints" / "gptq-4bit-32g-act-sym"
TABLE = {name: value for name, value in vars(elements).items() if name.isupper()}
IDS = {value for name, value in TABLE.items() if not name.endswith("_CLASS")}
CLASSES = {value for name, value in TABLE.items() if name.endswith("_CLASS")}
IN_A_SELECTOR = re.compile(r"(?<![\w&])#([a-z][\w-]*)")


def selectors(css: str) -> str:
    """Return a style sheet without its comments and declarations, whose colours begin as ids do."""
    return re.sub(r"/\*.*?\*/|\{[^{}]*\}", " ", css, flags=re.DOTALL)


def strings(source: str) -> str:
    """Return the string literals of a script or a module."""
    return "\n".join(re.findall(r'"[^"\n]*"|\'[^\'\n]*\'', source))


@pytest.fixture(scope="module")
def pages() -> Iterator[list[dict[str, Any]]]:
    """The components of a page with downloads and of one without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", DeprecationWarning)  # gradio 6.31 with pandas 3
        pytest.importorskip("gradio")
        from gptq_loader_extensions.gradio.page import Parts, build_page

        yield [
            component
            for downloads in (True, False)
            for component in build_page(Parts(LocalModels(), downloads=downloads)).config[
                "components"
            ]
        ]
        gc.collect()


def test_no_name_stands_for_two_elements() -> None:
    assert len(IDS) + len(CLASSES) == len(TABLE)


def test_every_id_is_on_the_page_and_every_other_is_refused(pages: list[dict[str, Any]]) -> None:
    from gptq_loader_extensions.gradio.tabs.header import header_html
    from gptq_loader_extensions.gradio.views.plan_view import plan_html

    with gptq.load(CHECKPOINT, device="cpu") as model:
        html = header_html(Loaded("a", model)) + plan_html(model.plan)
    made = {component["props"].get("elem_id") for component in pages} - {None}
    assert made | set(re.findall(r" id='([^']+)'", html)) == IDS


def test_every_class_is_on_the_page_and_has_a_style(pages: list[dict[str, Any]]) -> None:
    made = {name for component in pages for name in component["props"].get("elem_classes") or ()}
    assert made == CLASSES
    used = selectors((PAGE / "style.css").read_text(encoding="utf-8"))
    used += strings((PAGE / "page.js").read_text(encoding="utf-8"))
    assert {name for name in CLASSES if not re.search(rf"\.{name}(?![\w-])", used)} == set()


@pytest.mark.parametrize("name", ["style.css", "page.js"])
def test_the_style_sheet_and_the_script_know_no_other_id(name: str) -> None:
    text = (PAGE / name).read_text(encoding="utf-8")
    used = IN_A_SELECTOR.findall(selectors(text) if name == "style.css" else strings(text))
    assert used
    assert set(used) - IDS == set()


def test_the_browser_tests_know_no_other_id() -> None:
    files = sorted((ROOT / "tests" / "browser").glob("test_page*.py"))
    used = {
        name
        for file in files
        for name in IN_A_SELECTOR.findall(strings(file.read_text(encoding="utf-8")))
    }
    assert "chat" in used
    assert {name for name in used if not name.endswith("-")} - IDS == set()
