"""Put the extension into text-generation-webui's user data, and take it out again."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.system.atomic_file import write_whole

__all__ = ["checked", "install", "uninstall"]

NAME = "gptq_loader"  # what its list of extensions calls it
SCRIPT = "script.py"


def checked(folder: Path) -> Path:
    """Make the path of text-generation-webui's folder absolute.

    Raises:
        OptionInvalid: it is not text-generation-webui's.
    """
    folder = Path(folder).expanduser().resolve()
    if (folder / "server.py").is_file() and (folder / "modules" / "models.py").is_file():
        return folder
    raise OptionInvalid(
        f"{folder} is not the folder of text-generation-webui: it has no server.py with modules "
        "beside it",
        hint="name the folder that its start script is in",
    )


def install(folder: Path) -> Path:
    """Write the extension; what an older version wrote is replaced."""
    extension = _extension(folder)
    extension.mkdir(parents=True, exist_ok=True)
    script = files("gptq_loader_extensions.webui").joinpath(SCRIPT).read_text(encoding="utf-8")
    write_whole(extension / SCRIPT, script)
    return extension


def uninstall(folder: Path) -> Path | None:
    """Remove the extension; None where there is none."""
    extension = _extension(folder)
    if not extension.exists():
        return None
    shutil.rmtree(extension)
    return extension


def _extension(folder: Path) -> Path:
    return checked(folder) / "user_data" / "extensions" / NAME
