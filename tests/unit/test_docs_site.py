"""Every page is in the site's menu, every link leads somewhere, every variable is documented."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from processes import run_process

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PACKAGES = ("gptq_loader_plugin", "kernels/gptq_loader_kernels", "extensions")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)")


def tracked(*patterns: str) -> list[Path]:
    """List the repository's files, those not yet committed among them."""
    list_files = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--"]
    completed = run_process([*list_files, *patterns], cwd=ROOT)
    if completed.returncode:
        pytest.skip("not a clone of the repository")
    return [path for line in completed.stdout.splitlines() if (path := ROOT / line).is_file()]


def links(file: Path) -> list[str]:
    """List the relative links of a Markdown file, those in blocks of code left out."""
    return LINK.findall(FENCE.sub("", file.read_text(encoding="utf-8")))


def menu(node: object) -> Iterator[str]:
    """List the pages in mkdocs.yml's nav."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict):
        for inner in node.values():
            yield from menu(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from menu(inner)


def test_every_page_is_in_the_menu() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in tracked("docs/*.md")}
    assert len(pages) > 30
    assert pages <= set(menu(nav))


def test_every_picture_is_on_a_page() -> None:
    shown = {(file.parent / link).resolve() for file in tracked("*.md") for link in links(file)}
    assert set(tracked("docs/*.png")) <= shown


def test_every_link_leads_somewhere() -> None:
    broken = [
        f"{file.relative_to(ROOT)}: {link}"
        for file in tracked("*.md")
        for link in links(file)
        if not (file.parent / link).exists()
    ]
    assert broken == []


def test_every_file_that_contributing_names_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {it for it in re.findall(r"`([\w.-]+(?:/[\w.-]+)+)/?`", text) if "NAME" not in it}
    assert len(named) > 40
    assert [it for it in sorted(named) if not (ROOT / it).exists()] == []


def test_every_variable_that_is_read_is_documented() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([A-Z][A-Z_]+)`", page))
    read = {name for file in tracked(*PACKAGES) if file.suffix == ".py" for name in variables(file)}
    assert {"GPTQ_LOADER_MODELS", "GPTQ_LOADER_EXLLAMA_BUILD", "WEBUI_DIR"} <= read
    assert read - documented == set()
    ours = {name for name in documented if name.startswith("GPTQ_LOADER_")}
    assert ours - read == set(), "documented, and read no more"


def variables(file: Path) -> Iterator[str]:
    """Name the variables that a file reads: our own by name, others where they are looked up."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Constant(value=str(name)) if re.fullmatch(r"GPTQ_LOADER_[A-Z_]+", name):
                yield name
            case (
                ast.Call(func=ast.Attribute(value=source, attr="get"), args=[looked_up, *_])
                | ast.Subscript(value=source, slice=looked_up, ctx=ast.Load())
            ) if ast.unparse(source).endswith("environ"):
                if isinstance(looked_up, ast.Constant):
                    yield str(looked_up.value)
