"""The command that lists what is installed, and whether it works here: plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.cli.options import JSON
from gptq_loader_plugin.cli.output import print_json, reported, say, show

if TYPE_CHECKING:
    import typer

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command(short_help="List what is installed, and whether it works here.")(reported(plugins))


def plugins(*, as_json: JSON = False) -> None:
    """List kernels, templates, readers, hosts and plugins: what works here, and if not why."""
    from gptq_loader_plugin.plugins.discovery import discover, to_json, write_plugins

    installed = discover()
    if as_json:
        print_json(to_json(installed))
    else:
        show(write_plugins(installed))
    broken = [plugin.name for plugin in installed if plugin.state == "broken"]
    if broken:
        others = ",".join(plugin.name for plugin in installed if plugin.state == "in force")
        say(
            f"warning: {', '.join(broken)} stands in the way of every load\n"
            f"hint: update or uninstall it, or leave it out: GPTQ_LOADER_PLUGINS={others}"
        )
