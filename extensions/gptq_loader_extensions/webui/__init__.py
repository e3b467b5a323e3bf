"""Offer the host "webui": a loader for GPTQ checkpoints in text-generation-webui."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.host import Ready

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from gptq_loader_plugin.host import Host, Readiness

__all__ = ["WebuiHost", "gptq_hosts"]


@dataclass(frozen=True, slots=True)
class WebuiHost:
    """Add a loader for GPTQ checkpoints to a text-generation-webui in a folder."""

    name: str = "webui"

    def install(self, **options: Any) -> Path:  # noqa: ANN401 - Host's signature; checked here
        """Install the extension that adds the loader into text-generation-webui's folder.

        Args:
            **options: `folder`, where text-generation-webui is.

        Returns:
            The extension's folder.

        Raises:
            OptionInvalid: no folder was named, or it is not text-generation-webui's.
        """
        if set(options) != {"folder"}:
            raise OptionInvalid(
                "installing into text-generation-webui takes one option, folder",
                hint="name the folder that has its server.py",
            )
        from gptq_loader_extensions.webui.install import install

        return install(options["folder"])

    def uninstall(self, *, folder: Path) -> Path | None:
        """Remove the extension; return its folder, or None where it was not installed.

        Raises:
            OptionInvalid: the folder is not text-generation-webui's.
        """
        from gptq_loader_extensions.webui.install import uninstall

        return uninstall(folder)

    def command(self, *, folder: Path, arguments: Sequence[str]) -> list[str]:
        """Return the command that starts text-generation-webui with the loader in it.

        Raises:
            OptionInvalid: the folder is not text-generation-webui's.
        """
        from gptq_loader_extensions.webui.install import resolve_folder

        launch = "gptq_loader_extensions.webui.launch"
        return [sys.executable, "-m", launch, str(resolve_folder(folder)), *arguments]

    def check(self) -> Readiness:
        """Return how it is installed; only the user knows where text-generation-webui is."""
        return Ready("text-generation-webui, in its folder", "gptq-loader webui install DIR")


@hookimpl
def gptq_hosts() -> list[Host]:
    """Offer text-generation-webui."""
    return [WebuiHost()]
