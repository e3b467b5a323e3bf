"""How much memory there is, is free, and is this process's: machine, container and process count.

psutil asks the system; limits of Linux control groups (version 2), which it does not read, are read
here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["free_addresses", "free_memory", "resident_memory", "total_memory"]

MEMBERSHIP = Path("/proc/self/cgroup")  # which control group this process is in
CGROUPS = Path("/sys/fs/cgroup")


def free_memory(*, membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> int:
    """Return the bytes this process may still take; the tightest of all limits counts.

    Args:
        membership: the file that says which control group this process is in.
        cgroups: where control groups are.
    """
    import psutil

    limits = [int(psutil.virtual_memory().available)]
    limits += [
        limit - _used(group)
        for group in _control_groups(membership, cgroups)
        if (limit := _limit(group)) is not None
    ]
    addresses = free_addresses()
    return min(limits if addresses is None else [*limits, addresses])


def free_addresses() -> int | None:
    """Return the bytes that a limit of addresses (ulimit -v) leaves, or None without one."""
    if sys.platform != "linux":
        return None
    import resource

    import psutil

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return max(limit - int(psutil.Process().memory_info().vms), 0)


def total_memory(*, membership: Path = MEMBERSHIP, cgroups: Path = CGROUPS) -> int:
    """Return the bytes of the machine's memory, or of the container's where that is less.

    Args:
        membership: as for `free_memory`.
        cgroups: as for `free_memory`.
    """
    import psutil

    limits = [_limit(group) for group in _control_groups(membership, cgroups)]
    return min(
        [int(psutil.virtual_memory().total), *(limit for limit in limits if limit is not None)]
    )


def resident_memory() -> int:
    """Return the bytes of memory this process holds."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _control_groups(membership: Path, cgroups: Path) -> Iterator[Path]:
    """List the control group that holds this process, and those that hold it."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    inside = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    group = cgroups / inside
    while group.is_relative_to(cgroups):
        yield group
        group = group.parent


def _limit(group: Path) -> int | None:
    try:
        return int((group / "memory.max").read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


def _used(group: Path) -> int:
    try:
        used = int((group / "memory.current").read_text())
        stat = (group / "memory.stat").read_text().split()
        # pages of files that were read are given back when they are needed
        return used - int(stat[stat.index("inactive_file") + 1])
    except (OSError, ValueError):
        return 0
