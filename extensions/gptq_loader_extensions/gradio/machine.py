"""Say how much memory this machine has left and how much of it this process holds."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["free_bytes", "resident_bytes"]


def resident_bytes(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Give the memory this process holds; None where the system has no such file to tell."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


def free_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Give the memory that may still be taken; None where the system does not tell."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
