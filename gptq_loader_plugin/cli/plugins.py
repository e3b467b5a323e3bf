"""The command that lists what is installed, and whether it works here: plugins."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, get_args

from gptq_loader_plugin.cli.options import JSON
from gptq_loader_plugin.cli.output import print_json, reported, say, show, yes_no

if TYPE_CHECKING:
    from collections.abc import Iterable

    import typer

    from gptq_loader_plugin.plugins.discovery import InstalledPlugin

__all__ = ["add_to", "describe"]

LEFT_OUT = "left out by GPTQ_LOADER_PLUGINS"
PIPED_WIDTH = 10_000  # columns, where no terminal says its own: a line each


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="List what is installed, and whether it works here.")(reported(plugins))


def plugins(*, as_json: JSON = False) -> None:
    """List kernels, templates, readers, hosts and plugins: what works here, and if not why."""
    from gptq_loader_plugin.plugins.discovery import discover, to_json

    installed = discover()
    if as_json:
        print_json(to_json(installed))
    else:
        show(describe(installed))
    broken = [plugin.name for plugin in installed if plugin.state == "broken"]
    if broken:
        others = ",".join(plugin.name for plugin in installed if plugin.state == "in force")
        say(
            f"warning: {', '.join(broken)} stands in the way of every load\n"
            f"hint: update or uninstall it, or leave it out: GPTQ_LOADER_PLUGINS={others}"
        )


def describe(installed: Iterable[InstalledPlugin], *, width: int | None = None) -> str:
    """Describe plugins as tables: what is offered, kind by kind, and the plugins themselves.

    Args:
        installed: the plugins.
        width: how many columns a line may have; None takes the terminal's.
    """
    from rich.console import Console
    from rich.table import Table

    from gptq_loader_plugin.plugins.discovery import Kind

    plugins = list(installed)
    sections: list[tuple[str, str, list[tuple[str, str, str, str]]]] = []
    for kind in get_args(Kind):
        rows = [
            (offer.name, yes_no(offer.works, unknown="?"), plugin.name, offer.detail)
            for plugin in plugins
            for offer in plugin.offers
            if offer.kind == kind
        ]
        sections.append((f"{kind}s", "plugin", sorted(rows)))
    rows = [
        (
            plugin.name,
            yes_no(plugin.state == "in force"),
            plugin.source,
            plugin.error or (LEFT_OUT if plugin.state == "left out" else ""),
        )
        for plugin in plugins
    ]
    sections.append(("plugins", "from", rows))
    widths = [
        max((len(row[i]) for _, _, rows in sections for row in rows), default=0) for i in range(3)
    ]
    if width is None and not sys.stdout.isatty():
        width = PIPED_WIDTH
    console = Console(width=width, color_system=None, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for title, source, rows in sections:
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
            for header, column_width in zip((title, "here", source), widths, strict=True):
                table.add_column(header, min_width=column_width, no_wrap=True)
            table.add_column("")
            for row in rows:
                table.add_row(*row)
            console.print(table)
            console.print()
    return "\n".join(line.rstrip() for line in captured.get().strip().splitlines())
