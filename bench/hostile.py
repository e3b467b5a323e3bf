"""Hold one client's stream against requests that are meant to keep everybody waiting.

    gptq-loader serve demo --port 8000 &
    python bench/hostile.py http://127.0.0.1:8000 [--key KEY] [--json FILE]

A patient client streams a reply all the time. Beside it come, one kind after the other and three at
a time: 4 MB of letters, of spaces, of control tokens, of private-use characters and of empty
lists; 10,000 messages; tools, schemas, enums and patterns as large as a body may be. It prints the
longest pause between two events of the patient client's beside each kind, and the statuses, and
fails on a pause of more than half a second or a 500. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

LONGEST_PAUSE = 0.5
AT_A_TIME = 3
SIZE = 3_900_000  # of 4 MiB
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
COUNT, KOBOLD = "/v1/internal/token-count", "/api/v1/generate"
PATIENT = {"prompt": "Once upon a time", "temperature": 0.7, "seed": 1, "stream": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="the server, without /v1")
    parser.add_argument("--key", default="anything")
    parser.add_argument("--tokens", type=int, default=400, help="of one patient reply")
    parser.add_argument("--only", help="a part of the kinds' names")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    headers = {"Authorization": f"Bearer {arguments.key}"}
    with httpx.Client(base_url=arguments.url, headers=headers, timeout=600) as client:
        rows = [
            beside(client, name, path, content, arguments.tokens)
            for name, (path, content) in requests().items()
            if not arguments.only or arguments.only in name
        ]
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    longest = max(row["pause"] for row in rows)
    print(f"longest pause {longest:.3f} s, at load {os.getloadavg()[0]:.1f}")
    failed = [row for row in rows if row["pause"] > LONGEST_PAUSE or max(row["statuses"]) == 500]
    raise SystemExit(1 if failed else 0)


def requests() -> dict[str, tuple[str, bytes]]:
    """Make the hostile requests: a path and a body for each name."""

    def chat(text: str, **more: Any) -> tuple[str, bytes]:  # noqa: ANN401 - any JSON
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1, **more}
        return CHAT, json.dumps(body, ensure_ascii=False).encode()

    def schema(content: dict[str, Any]) -> tuple[str, bytes]:
        schema = {"name": "x", "schema": content}
        return chat("x", response_format={"type": "json_schema", "json_schema": schema})

    def tool(parameters: dict[str, Any]) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "f", "parameters": parameters}}

    def nested(depth: int) -> dict[str, Any]:
        content: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            content = {"type": "array", "items": content}
        return content

    private = "".join(map(chr, range(0xE000, 0xF900)))
    controls = "<|im_end|>"
    brackets = "[" * 100_000 + "]" * 100_000
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": brackets}}
    names = [f"{i:06x}" for i in range(20_000)]
    letters = json.dumps({"prompt": "a" * SIZE, "max_tokens": 1}).encode()
    return {
        "nothing": ("/v1/internal/model/info", b""),
        "letters, chat": chat("a" * SIZE),
        "words, chat": chat("word " * (SIZE // 5)),
        "spaces, chat": chat(" " * SIZE),
        "letters, completion": (COMPLETE, letters),
        "letters, Kobold": (KOBOLD, letters),
        "letters, count": (COUNT, json.dumps({"text": "a" * SIZE}).encode()),
        "control tokens, chat": chat(controls * (SIZE // len(controls))),
        "control tokens that fit, chat": chat(controls * 6000),
        "control tokens, completion": (
            COMPLETE,
            json.dumps({"prompt": controls * (SIZE // len(controls))}).encode(),
        ),
        "private use, chat": chat(f"{controls}</s>{private * (SIZE // 3 // len(private))}"),
        "private use that fits, chat": chat(f"{controls}</s>{private}"),
        "messages": (
            CHAT,
            json.dumps(
                {"messages": [{"role": "user", "content": f"{controls} x"}] * 10_000}
            ).encode(),
        ),
        "deep arguments": (
            CHAT,
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "x"},
                        {"role": "assistant", "content": None, "tool_calls": [call]},
                        {"role": "user", "content": "x"},
                    ],
                    "max_tokens": 1,
                }
            ).encode(),
        ),
        "tools": chat("x", tools=[tool({"enum": names * 6})]),
        "schema, deep": schema(nested(60)),
        "schema, enum": schema({"enum": names}),
        "schema, large enum": schema({"enum": names * 18}),
        "schema, pattern": schema({"type": "string", "pattern": "|".join(names)}),
        "schema, nested pattern": schema({"type": "string", "pattern": "(([ab]+)+c?)+" * 300}),
        "schema, properties": schema(
            {"type": "object", "properties": {name: {"type": "integer"} for name in names[:5000]}}
        ),
        "schema, constant": schema({"const": "a" * 200_000}),
        "lists": (CHAT, b'{"messages": [' + b"[]," * (SIZE // 3) + b"[]]}"),
        "keys": (CHAT, json.dumps(dict.fromkeys(map(str, range(150_000)), 1)).encode()),
        "strings for ids": (COMPLETE, b'{"prompt": [' + b'"a",' * 190_000 + b'"a"]}'),
        "ids": (COMPLETE, b'{"prompt": [' + b"1," * 990_000 + b"1]}"),
        "prompts to score": (
            COMPLETE,
            json.dumps(
                {"prompt": ["word " * 400] * 16, "echo": True, "logprobs": 5, "max_tokens": 0}
            ).encode(),
        ),
    }


def beside(
    client: httpx.Client, name: str, path: str, content: bytes, tokens: int
) -> dict[str, Any]:
    """Stream replies until the hostile requests have been answered; print the longest pause."""
    ended = threading.Event()
    times: list[list[float]] = []

    def patient() -> None:
        while not ended.is_set():
            times.append([])
            with client.stream("POST", COMPLETE, json={**PATIENT, "max_tokens": tokens}) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        times[-1].append(time.monotonic())
                    if ended.is_set():
                        break

    def hostile(_: int) -> int:
        if not content:
            time.sleep(2)
            return client.get(path).status_code
        headers = {"Content-Type": "application/json"}
        return client.post(path, content=content, headers=headers).status_code

    stream = threading.Thread(target=patient)
    stream.start()
    while not (times and times[0]):  # it has begun
        time.sleep(0.05)
    began = time.monotonic()
    try:
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            statuses = sorted(pool.map(hostile, range(AT_A_TIME)))
        seconds = time.monotonic() - began
        time.sleep(0.3)
    finally:
        ended.set()
        stream.join()
    pauses = [b - a for reply in times for a, b in pairwise(reply)]
    row = {"name": name, "pause": max(pauses), "seconds": seconds, "statuses": statuses}
    shown = ", ".join(map(str, statuses))
    print(f"{name:32} pause {max(pauses):6.3f} s; {seconds:6.1f} s; {shown}", flush=True)
    return row


if __name__ == "__main__":
    main()
