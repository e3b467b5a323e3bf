"""Install the extension into text-generation-webui's user data, and remove it."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.system.atomic_file import write_whole

__all__ = ["install", "resolve_folder", "uninstall"]

NAME = "gptq_loader"  # in its list of extensions
SCRIPT = "script.py"


def resolve_folder(folder: Path) -> Path:
    """Return the absolute path of text-generation-webui's folder.

    Raises:
        OptionInvalid: it is another folder.
    """
    folder = Path(folder).expanduser().resolve()
    if (folder / "server.py").is_file() and (folder / "modules" / "models.py").is_file():
        return folder
    raise OptionInvalid(
        f"{folder} is not the folder of text-generation-webui: server.py and modules/models.py are "
        "not there",
        hint="name the folder that has its start script",
    )


def install(folder: Path) -> Path:
    """Write the extension, over an older version's; return its folder."""
    extension = _extension(folder)
    extension.mkdir(parents=True, exist_ok=True)
    script = files("gptq_loader_extensions.webui").joinpath(SCRIPT).read_text(encoding="utf-8")
    write_whole(extension / SCRIPT, script)
    return extension


def uninstall(folder: Path) -> Path | None:
    """Remove the extension; return its folder, or None where it was not installed."""
    extension = _extension(folder)
    if not extension.exists():
        return None
    shutil.rmtree(extension)
    return extension


def _extension(folder: Path) -> Path:
    return resolve_folder(folder) / "user_data" / "extensions" / NAME
