"""Make what the site has beside docs/: reference pages from the code, and README.md and the like.

A hook file of mkdocs (mkdocs.yml names it). Nothing that it makes is written into the repository.

Links in Markdown are those of the repository, so that they work where its files are read. Here they
become the site's: to a page of it where there is one; to the repository where `repo_url` is set in
mkdocs.yml; and else, as a source file has no page, to plain code. A link to nothing is left as it
is, and fails the build.
"""

import os
import posixpath
import re

import griffe
import typer
from mkdocs.structure.files import File

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGE = "gptq_loader_plugin"
# Files outside docs/ that are pages: where each lies in the repository, and where in the site.
TAKEN_IN = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(!?)\[([^]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the pages that do not lie in docs/."""
    for source, page in TAKEN_IN.items():
        with open(os.path.join(ROOT, source), encoding="utf-8") as file:
            files.append(File.generated(config, page, content=file.read()))
    made = {"commands": commands_page, "python": python_page, "hooks": hooks_page}
    for name, write in made.items():
        files.append(File.generated(config, f"reference/{name}.md", content=write()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn the repository's links into the site's."""
    source = {site: path for path, site in TAKEN_IN.items()}.get(page.file.src_uri)
    source = source or posixpath.join("docs", page.file.src_uri)

    def rewrite(link):
        image, text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        site = find_page(path, files)
        if site:
            here = posixpath.dirname(page.file.src_uri)
            return f"{image}[{text}]({posixpath.relpath(site, here or '.')}{anchor or ''})"
        if not os.path.exists(os.path.join(ROOT, path)):
            return link.group()
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{path})"
        if "`" in text:
            return text
        return f"`{path}`" if text == path else f"{text} (`{path}`)"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else LINK.sub(rewrite, part) for part in parts)


def find_page(path, files):
    """Find the page or picture of the site that a file or folder of the repository is."""
    for each in (path, posixpath.join(path, "README.md")):
        site = TAKEN_IN.get(each) or posixpath.relpath(each, "docs")
        if files.get_file_from_path(site):
            return site
    return None


def commands_page():
    """List every command with its arguments and options, in the words of its own --help."""
    from gptq_loader_plugin.cli.app import app

    lines = ["# Commands", "", "What `--help` says of each command, on one page.", ""]
    lines += list(describe_command(typer.main.get_command(app), "gptq-loader", None))
    return "\n".join(lines)


def describe_command(command, path, parent):
    """Describe one command, and those within it."""
    context = typer.Context(command, info_name=path.rpartition(" ")[2], parent=parent)
    yield f"## `{path}`\n"
    yield f"{command.help or ''}\n"
    yield f"```text\n{command.get_usage(context).removeprefix('Usage: ')}\n```\n"
    rows = [each.get_help_record(context) for each in command.params]
    rows = [each for each in rows if each]
    if rows:
        yield "| option or argument | |\n|---|---|"
        yield from (f"| `{name}` | {in_cell(words)} |" for name, words in rows)
        yield ""
    for name, inner in getattr(command, "commands", {}).items():
        yield from describe_command(inner, f"{path} {name}", context)


def in_cell(text):
    """Write words into a table's cell as they are."""
    return re.sub(r"([|<>*_\[\]])", r"\\\1", " ".join(text.split()))


def python_page():
    """List the public names: functions, then classes, then errors, from their docstrings."""
    package = griffe.load(PACKAGE, search_paths=[ROOT])
    groups = {"Functions": [], "Classes": [], "Errors": [], "Markers": []}
    for name in package.exports:
        found = package[name].final_target
        errors = found.path.startswith(f"{PACKAGE}.errors.")
        group = "Errors" if errors else "Functions" if found.is_function else "Classes"
        groups["Markers" if found.is_attribute else group].append(name)
    lines = ["# Python", "", f"All that `import {PACKAGE}` offers; what is not here may change."]
    for group, names in groups.items():
        lines += ["", f"## {group}", "", *(f"::: {PACKAGE}.{name}" for name in names)]
    return "\n".join(lines) + "\n"


def hooks_page():
    """List the hooks a plugin may implement, from their docstrings."""
    module = griffe.load(f"{PACKAGE}.hookspecs", search_paths=[ROOT])
    names = [name for name in module.functions if name.startswith("gptq_")]
    head = "# Hooks, one by one\n\n[Hooks](../hooks.md) shows a plugin for each.\n"
    return "\n".join([head, *(f"::: {PACKAGE}.hookspecs.{name}" for name in names)]) + "\n"
