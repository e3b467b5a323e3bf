"""The folders of this user and machine: what is made once, kept settings and figures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = ["cache_folder"]


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder for what is made once: `GPTQ_LOADER_CACHE`, else the user's cache."""
    if named := environ.get("GPTQ_LOADER_CACHE"):
        return Path(named).expanduser()
    base = environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "gptq-loader"
