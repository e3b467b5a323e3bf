"""Have many bad clients use a server for a while, and say whether it took harm.

    gptq-loader serve --models-dir FOLDER --port 8000 &
    python bench/soak.py http://127.0.0.1:8000 --minutes 15 [--watch FOLDER] [--json FILE]

Clients chat, stream, hang up, send bodies made wrong from the server's own schema, bring wrong
keys and prompts far too long, and swap the model for another one. Every minute they rest, the
first model is loaded once more, and the server's own memory is read: what does not come back is a
leak. It fails on any 5xx that the schema does not promise, an answer that is no JSON, memory that
rises by more than 5 % after a warm-up, a request that never ends, and a file in a watched folder
that was written. Memory may fall: what the allocator kept of a busy time goes back when it can.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from clients import CHAT, PATIENCE, Clients, Seen

FLAT = 0.05
WARM = 0.2  # of the time
REST = 60.0  # seconds from one reading of memory to the next


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="the server, on this machine, without /v1")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--key", help="the API key")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--watch", type=Path, action="append", default=[], metavar="FOLDER")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    before = {folder: written(folder) for folder in arguments.watch}
    seen = Soak(arguments).run()
    for folder, files in before.items():
        for file in sorted(written(folder) ^ files):
            seen.fault(f"{file[0]} was written")
    report = summary(seen)
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2), encoding="utf-8")
    raise SystemExit(1 if report["faults"] else 0)


def written(folder: Path) -> set[tuple[str, int, int]]:
    """List a folder's files with their sizes and times."""
    found = [(str(it), it.lstat()) for it in folder.rglob("*")]
    return {(name, its.st_size, its.st_mtime_ns) for name, its in found if not name.endswith("/")}


def summary(seen: Seen) -> dict[str, Any]:
    """Judge the memory, and put together what is told."""
    sizes = [size for _, size in seen.rested]
    warm = sizes[max(1, round(len(sizes) * WARM)) :]
    risen = rise(warm)
    if risen > FLAT:
        seen.fault(f"memory at rest rose by {risen:.0%}, between {min(warm)} and {max(warm)} bytes")
    return {
        "requests": sum(seen.done.values()),
        "done": dict(seen.done.most_common()),
        "answers": dict(sorted(seen.answers.items())),
        "rested_mb": [round(it / 1e6, 1) for it in sizes],
        "rested_rise": round(risen, 4),
        "rested_spread": round(max(warm) / min(warm) - 1, 4) if warm else None,
        "busy_mb": [round(it / 1e6) for _, it in seen.busy],
        "faults": seen.faults,
    }


def rise(sizes: list[int]) -> float:
    """Give the most by which one is above an earlier one, as a part of that."""
    return max((later / min(sizes[: i + 1]) - 1 for i, later in enumerate(sizes)), default=0.0)


def own_memory(process: psutil.Process) -> int:
    """Give the bytes that would be free if the process ended, but for those of files.

    Pages of a library are a process's own until another process maps it too.
    """
    if sys.platform == "linux":
        return sum(it.anonymous for it in process.memory_maps())
    return int(process.memory_full_info().uss)


def listening_on(url: str) -> psutil.Process:
    """Find the process that serves."""
    port = urlsplit(url).port
    for it in psutil.net_connections("tcp"):
        if it.status == psutil.CONN_LISTEN and it.laddr.port == port and it.pid is not None:
            return psutil.Process(it.pid)
    raise SystemExit(f"no process of this machine listens on port {port}")


class Soak:
    """Clients of one server.

    Args:
        arguments: the command line's.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._seen = Seen()
        self._process = listening_on(arguments.url)
        self._key = {"Authorization": f"Bearer {arguments.key}"} if arguments.key else {}
        self._models: list[str] = []

    def run(self) -> Seen:
        """Run for as long as was asked."""
        asyncio.run(self._run())
        return self._seen

    async def _run(self) -> None:
        # A server closes what was idle for some seconds: no request may meet that.
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=self._arguments.url, headers=self._key, timeout=PATIENCE, limits=limits
        ) as self._client:
            self._models = [it["id"] for it in (await self._get("/v1/models"))["data"]][:2]
            schema = await self._get("/openapi.json")
            draw = random.Random(self._arguments.seed)  # noqa: S311 - to be had again
            clients = Clients(self._client, schema, self._models, draw, self._seen)
            self._talk = clients.talk
            began = time.monotonic()
            until = began + 60 * self._arguments.minutes
            await self._rest(began)
            while time.monotonic() < until:
                end = min(time.monotonic() + REST, until)
                many = [clients.work(end) for _ in range(self._arguments.clients)]
                await asyncio.gather(*many, self._watch(began, end))
                await self._rest(began)
            answer = await self._client.post(CHAT, json=self._talk(max_tokens=4))
            if answer.status_code != httpx.codes.OK:
                self._seen.fault(f"the last chat got {answer.status_code}")

    async def _get(self, path: str) -> Any:  # noqa: ANN401 - any JSON
        return (await self._client.get(path)).json()

    async def _watch(self, began: float, until: float) -> None:
        while time.monotonic() < until:
            await asyncio.sleep(5)
            self._seen.busy.append((time.monotonic() - began, own_memory(self._process)))

    async def _rest(self, began: float) -> None:
        """Wait until nothing runs, load the first model anew, and read the memory."""
        for _ in range(600):
            health = await self._get("/health")
            if not health["running"] and not health["waiting"]:
                break
            await asyncio.sleep(0.2)
        else:
            self._seen.fault(f"work that does not end: {health}")
        for model in (*self._models[1:], self._models[0]):
            answer = await self._client.post(CHAT, json=self._talk(model=model, max_tokens=8))
            if answer.status_code != httpx.codes.OK:
                self._seen.fault(f"a chat at rest got {answer.status_code}: {answer.text[:200]}")
        await asyncio.sleep(1)
        size = own_memory(self._process)
        self._seen.rested.append((time.monotonic() - began, size))
        print(f"{time.monotonic() - began:6.0f} s  {size / 1e6:7.1f} MB at rest", file=sys.stderr)


if __name__ == "__main__":
    main()
