"""Count the memory that this process may still take: the machine's, its container's, its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["free_memory"]

CGROUPS = Path("/sys/fs/cgroup")


def free_memory(*, membership: Path = Path("/proc/self/cgroup"), cgroups: Path = CGROUPS) -> int:
    """Give the bytes that are free; the least of all limits counts.

    Args:
        membership: the file that says which control group this process is in.
        cgroups: where control groups are.
    """
    import psutil

    limits = [int(psutil.virtual_memory().available), *_of_groups(membership, cgroups)]
    if sys.platform == "linux":
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            limits.append(most - int(psutil.Process().memory_info().vms))
    return min(limits)


def _of_groups(membership: Path, cgroups: Path) -> Iterator[int]:
    """Give what each control group that holds this process leaves it (version 2 of them)."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    inside = next((it.removeprefix("0::/") for it in lines if it.startswith("0::/")), "")
    group = cgroups / inside
    while group.is_relative_to(cgroups):
        try:
            most = int((group / "memory.max").read_text())  # "max" is no limit
            used = int((group / "memory.current").read_text())
            kept = (group / "memory.stat").read_text().split()
            # of files that were read: given back when it is needed
            yield most - used + int(kept[kept.index("inactive_file") + 1])
        except (OSError, ValueError):
            pass
        group = group.parent
