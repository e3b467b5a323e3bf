"""Hold a lock that other processes see, too; the system takes it from a process that dies."""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

__all__ = ["changing", "held", "held_and_removed", "lock_holder"]

WAIT = 0.1  # seconds between two tries to get a lock
PATIENCE = 20.0  # seconds to wait for a small file's lock, which is held for milliseconds


@contextmanager
def held(lock: Path, *, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock, inside. Its file stays, for the next one.

    Args:
        lock: its file; its folder is made where it is not there.
        waiting: called again and again with who has it, a process's number or "another process";
            an error that it raises ends the wait.

    Raises:
        OSError: the file cannot be made.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    taken = FileLock(lock, mode=0o664)
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            taken.acquire(timeout=0)
            break
        except NotImplementedError:  # a file system without locks
            taken = SoftFileLock(lock)
        except FileNotFoundError:  # whoever had it has removed the folder
            continue
        except Timeout:
            waiting(_holder(lock))
            time.sleep(WAIT)
    try:
        with suppress(OSError):  # on a full disk it has no name, and is held all the same
            lock_holder(lock).write_text(
                f"{os.getpid()} on {socket.gethostname()}", encoding="utf-8"
            )
        yield
    finally:
        with suppress(OSError):
            lock_holder(lock).unlink(missing_ok=True)
        taken.release()


@contextmanager
def held_and_removed(lock: Path, *, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock, inside, as `held` does, and leave no file behind.

    Whoever gets the lock of a file that has gone meanwhile tries again (filelock 3.21 and later).
    """
    with held(lock, waiting=waiting):
        try:
            yield
        finally:
            if os.name == "posix":  # while it is held: the next one's must not go
                lock.unlink(missing_ok=True)
    if os.name != "posix":
        with suppress(OSError):  # Windows keeps a file that another process has open
            lock.unlink(missing_ok=True)


@contextmanager
def changing(file: Path) -> Iterator[None]:
    """Keep other processes from changing a file, inside, where it is read, changed and written.

    Raises:
        OSError: it cannot be locked, or another process does not let go of it.
    """
    end = time.monotonic() + PATIENCE

    def waiting(holder: str) -> None:
        if time.monotonic() > end:
            raise TimeoutError(errno.ETIMEDOUT, f"{holder} is writing to it", str(file))

    with held_and_removed(file.with_name(f".{file.name}.lock"), waiting=waiting):
        yield


def lock_holder(lock: Path) -> Path:
    """Name the file that says which process holds a lock."""
    return lock.with_name(f"{lock.name}.holder")


def _holder(lock: Path) -> str:
    """Name the process that has a lock, by its number; and its machine, where it is another."""
    try:
        number, _, machine = lock_holder(lock).read_text(encoding="utf-8").partition(" on ")
    except OSError:
        return "another process"
    here = machine == socket.gethostname()
    return f"process {number}" + ("" if here else f" on {machine}") if number else "another process"
