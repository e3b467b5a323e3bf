"""Load an OpenAI-compatible server with clients, and say what they got.

    gptq-loader serve demo --port 8000 &
    python bench/serving.py http://127.0.0.1:8000 --clients 1,4,16 --seconds 120 [--json FILE]

Each client streams one chat after the other, every one with a prompt of its own, and asks for the
usage. Tokens a second are those of all clients together; the first token's time counts from the
request; a token's latency is the time of a reply after its first token, over its other tokens.
Another server (`--model` as it names the model) is measured the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import httpx

THINGS = ("rivers", "bridges", "clocks", "bees", "maps", "salt", "glass", "trains", "owls", "bread")


@dataclass
class Found:
    """What the clients of one round saw."""

    tokens: int = 0
    first: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="the server, without /v1")
    parser.add_argument("--model", help="its name; else the first one that is listed")
    parser.add_argument("--key", default="none", help="the API key")
    parser.add_argument("--clients", default="1,4,16", help="how many at a time, by turns")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=128, help="the most of a reply")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = asyncio.run(measure(arguments))
    print(
        "| clients | tokens/s | first token p50, p95 (s) | each token p50, p95 (ms) | replies "
        "| errors |"
    )
    print("|---|---|---|---|---|---|")
    for row in rows:
        first, each = row["first_seconds"], row["token_seconds"]
        print(
            f"| {row['clients']} | {row['tokens_per_second']:.0f} | {first[0]:.2f}, {first[1]:.2f} "
            f"| {each[0] * 1e3:.0f}, {each[1] * 1e3:.0f} | {row['replies']} | {row['errors']} |"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


async def measure(arguments: argparse.Namespace) -> list[dict]:
    headers = {"Authorization": f"Bearer {arguments.key}"}
    async with httpx.AsyncClient(base_url=arguments.url, headers=headers, timeout=600) as client:
        model = arguments.model or (await client.get("/v1/models")).json()["data"][0]["id"]
        numbers = count()
        await chat(client, model, next(numbers), 16, Found())  # warm
        rows = []
        for clients in map(int, arguments.clients.split(",")):
            found, began = Found(), time.monotonic()
            until = began + arguments.seconds

            async def one(until: float = until, found: Found = found) -> None:
                while time.monotonic() < until:
                    await chat(client, model, next(numbers), arguments.tokens, found)

            await asyncio.gather(*(one() for _ in range(clients)))
            seconds = time.monotonic() - began
            rows.append(
                {
                    "clients": clients,
                    "tokens_per_second": found.tokens / seconds,
                    "first_seconds": [share(found.first, 0.5), share(found.first, 0.95)],
                    "token_seconds": [share(found.each, 0.5), share(found.each, 0.95)],
                    "replies": len(found.first),
                    "errors": len(found.errors),
                    "seen": sorted(set(found.errors)),
                }
            )
        return rows


async def chat(
    client: httpx.AsyncClient, model: str, number: int, tokens: int, found: Found
) -> None:
    thing = THINGS[number % len(THINGS)]
    body = {
        "model": model,
        "messages": [
            {"role": "user", "content": f"Story {number}: tell me of {thing}, at length."}
        ],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began = time.monotonic()
    first, last, made = None, began, 0
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != httpx.codes.OK:
                found.errors.append(f"{answer.status_code} {(await answer.aread())[:200]!r}")
                return
            async for line in answer.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    found.errors.append(str(event["error"]))
                    return
                if any(it["delta"].get("content") for it in event["choices"]):
                    last = time.monotonic()
                    first = first or last
                if event.get("usage"):
                    made = event["usage"]["completion_tokens"]
    except httpx.HTTPError as error:
        found.errors.append(repr(error))
        return
    found.tokens += made
    if first is not None:
        found.first.append(first - began)
        if made > 1:
            found.each.append((last - first) / (made - 1))


def share(values: list[float], part: float) -> float:
    """Give the value below which `part` of them lie."""
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


if __name__ == "__main__":
    main()
