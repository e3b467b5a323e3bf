"""Find this user's folders: for what can be made again, for settings and for measured figures.

They are where the system keeps such things (platformdirs). Earlier versions used the folders of
Linux everywhere: one that is there already stays in use, so that nothing is lost.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import PlatformDirs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from platformdirs.api import PlatformDirsABC

__all__ = ["cache_folder", "config_folder", "data_folder"]

NAME = "gptq-loader"


def cache_folder(
    environ: Mapping[str, str] = os.environ, *, system: type[PlatformDirsABC] = PlatformDirs
) -> Path:
    """Return the folder for what can be made again: `GPTQ_LOADER_CACHE`, or the user's cache.

    Args:
        environ: where `GPTQ_LOADER_CACHE` is looked up.
        system: the folders of this operating system.
    """
    usual = system(NAME, appauthor=False).user_cache_path
    return _named(environ, "GPTQ_LOADER_CACHE") or _existing("XDG_CACHE_HOME", ".cache", usual)


def data_folder(
    environ: Mapping[str, str] = os.environ, *, system: type[PlatformDirsABC] = PlatformDirs
) -> Path:
    """Return the folder for the user's data: `GPTQ_LOADER_DATA`, or the system's usual one."""
    usual = system(NAME, appauthor=False).user_data_path
    return _named(environ, "GPTQ_LOADER_DATA") or _existing("XDG_DATA_HOME", ".local/share", usual)


def config_folder(
    environ: Mapping[str, str] = os.environ, *, system: type[PlatformDirsABC] = PlatformDirs
) -> Path:
    """Return the folder for the user's settings: `GPTQ_LOADER_CONFIG`, or the system's usual one.

    On Windows they roam, so that they follow the user to other machines.
    """
    usual = system(NAME, appauthor=False, roaming=True).user_config_path
    return _named(environ, "GPTQ_LOADER_CONFIG") or _existing("XDG_CONFIG_HOME", ".config", usual)


def _named(environ: Mapping[str, str], variable: str) -> Path | None:
    named = environ.get(variable)
    return Path(named).expanduser() if named else None


def _existing(variable: str, below_home: str, usual: Path) -> Path:
    """Return the folder of earlier versions where there is one, or the usual folder."""
    base = os.environ.get(variable) or Path.home() / below_home
    earlier = Path(base) / NAME
    return earlier if earlier.is_dir() else usual
