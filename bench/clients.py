"""Clients that do what a server must bear: right and wrong requests, and leaving in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
from wrong_bodies import make_body, wrong_text

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable

__all__ = ["CHAT", "PATIENCE", "Clients", "Seen"]

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
# What a route may say where nothing is wrong with the server; 500 and 502 are never among them.
PROMISED = {
    "out_of_memory", "model_unusable", "stopped", "not_supported", "timeout",
}  # fmt: skip
PATIENCE = 120.0  # seconds until a request counts as never answered
JSON = {"content-type": "application/json"}
WORDS = ("river", "stone", "of", "the", "and", "bird", "slow", "light", "house", "under", "sea")


@dataclass
class Seen:
    """What came of it all."""

    answers: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    rested: list[tuple[float, int]] = field(default_factory=list)
    busy: list[tuple[float, int]] = field(default_factory=list)

    def fault(self, what: str) -> None:
        """Keep what should not be, and say so at once."""
        self.faults.append(what)
        print(f"FAULT {what}", file=sys.stderr, flush=True)


class Clients:
    """Clients of one server.

    Args:
        client: asks it.
        schema: its OpenAPI schema.
        models: two of its models.
        draw: chooses what they do.
        seen: where they tell what came of it.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        schema: dict[str, Any],
        models: list[str],
        draw: random.Random,
        seen: Seen,
    ) -> None:
        self._client = client
        self._schema = schema
        self._models = models
        self._draw = draw
        self._seen = seen
        self._acts: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (6, self.chat), (6, self.stream), (5, self.stream_and_leave), (4, self.ask_and_leave),
            (16, self.wrong), (3, self.raw), (3, self.half_a_request), (3, self.stranger),
            (2, self.giant), (2, self.long), (2, self.swap), (4, self.complete), (3, self.kobold),
            (3, self.textgen), (3, self.abort), (3, self.paths), (2, self.look), (2, self.grammar),
        ]  # fmt: skip

    async def work(self, until: float) -> None:
        """Be one client after the other."""
        weights = [weight for weight, _ in self._acts]
        while time.monotonic() < until:
            _, act = self._draw.choices(self._acts, weights)[0]
            self._seen.done[act.__name__] += 1
            try:
                await act()
            except httpx.TimeoutException as error:
                self._seen.fault(f"{act.__name__}: never answered: {error!r}")
            except (httpx.HTTPError, OSError) as error:
                self._seen.fault(f"{act.__name__}: {error!r}")

    def talk(self, **more: object) -> dict[str, Any]:
        """Make a request for a chat."""
        text = f"Story {self._draw.randrange(10**9)}: tell me of rivers."
        return {"messages": [{"role": "user", "content": text}], **more}

    def _some_model(self) -> dict[str, str]:
        return {"model": self._draw.choice(self._models)} if self._draw.random() < 0.1 else {}

    def _judge(self, what: str, answer: httpx.Response) -> None:
        """Count an answer; one that must not be is a fault."""
        status = answer.status_code
        self._seen.answers[f"{status}"] += 1
        if status < 400:
            return
        try:
            code = answer.json()["error"]["code"]
        except (ValueError, KeyError, TypeError):
            self._seen.fault(f"{what}: {status} without words: {answer.text[:200]!r}")
            return
        if status >= 500 and code not in PROMISED:
            self._seen.fault(f"{what}: {status} {answer.text[:300]}")

    async def _post(
        self, path: str, body: object, *, method: str = "POST", patience: float = PATIENCE
    ) -> None:
        answer = await self._client.request(method, path, json=body, timeout=patience)
        self._judge(f"{method} {path} {json.dumps(body)[:300]}", answer)

    async def chat(self) -> None:
        """Ask for a short reply."""
        body = self.talk(max_tokens=self._draw.choice((1, 16, 60)), **self._some_model())
        await self._post(CHAT, body)

    async def stream(self) -> None:
        """Read a stream to its end."""
        await self._stream(self.talk(max_tokens=40, **self._some_model()), leave=10**9)

    async def stream_and_leave(self) -> None:
        """Hang up after some events."""
        body = self.talk(max_tokens=2000, n=self._draw.choice((1, 1, 3)))
        await self._stream(body, leave=self._draw.randrange(12))

    async def _stream(self, body: dict[str, Any], *, leave: int) -> None:
        async with self._client.stream("POST", CHAT, json={**body, "stream": True}) as answer:
            if answer.status_code != httpx.codes.OK:
                await answer.aread()
                self._judge("stream", answer)
                return
            last = ""
            async for line in answer.aiter_lines():
                last = line or last
                if '"error"' in line and "internal_error" in line:
                    self._seen.fault(f"in a stream: {line[:300]}")
                leave -= bool(line)
                if leave <= 0:
                    self._seen.answers["left"] += 1
                    return
            self._seen.answers["200"] += 1
            if last != "data: [DONE]":
                self._seen.fault(f"a stream ended with {last[:200]!r}")

    async def ask_and_leave(self) -> None:
        """Hang up before the answer is there."""
        with contextlib.suppress(httpx.TimeoutException):
            limit = self._draw.uniform(0.001, 1.0)
            await self._post(CHAT, self.talk(max_tokens=2000), patience=limit)

    async def wrong(self) -> None:
        """Send a body made of a route's schema, with something wrong in it."""
        routes = [
            (path, method, its)
            for path, methods in self._schema["paths"].items()
            for method, its in methods.items()
            if method in ("post", "put")
        ]
        path, method, its = self._draw.choice(routes)
        body = make_body(self._draw, self._schema, its)
        if isinstance(body, dict) and "model" in body and self._draw.random() < 0.7:
            del body["model"]
        if isinstance(body, dict) and body.get("max_tokens", 17) is not None:
            body["max_tokens"] = self._draw.choice((1, 8, 30, "9", -1, 1.5))
        content = json.dumps(body).encode()
        answer = await self._client.request(method, path, content=content, headers=JSON)
        self._judge(f"{method} {path} {content[:600]!r}", answer)

    async def raw(self) -> None:
        """Send bytes that are no JSON, or no UTF-8, or nested too deep."""
        content = wrong_text(self._draw)
        kind = self._draw.choice(("application/json", "text/plain", "multipart/form-data", "\xff"))
        path = self._draw.choice((CHAT, COMPLETE, "/api/v1/generate", "/v1/internal/encode"))
        headers = {"content-type": kind.encode("latin-1")}
        answer = await self._client.post(path, content=content, headers=headers)
        self._judge(f"raw {path} {content[:80]!r}", answer)

    async def half_a_request(self) -> None:
        """Send a part of a request, and hang up or wait for a while."""
        where = urlsplit(str(self._client.base_url))
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        whole = (
            f"POST {CHAT} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: 5000\r\n\r\n" + '{"messages": ['
        ).encode()
        writer.write(whole[: self._draw.randrange(1, len(whole))])
        with contextlib.suppress(OSError):
            await writer.drain()
            await asyncio.sleep(self._draw.choice((0, 0, 0.5)))
        writer.close()
        del reader
        self._seen.answers["half"] += 1

    async def stranger(self) -> None:
        """Bring a wrong key, a wrong name, or another origin."""
        headers = self._draw.choice(
            (
                {"Authorization": "Bearer wrong"},
                {"Authorization": "Basic \u00e4=".encode("latin-1")},
                {"Host": "evil.example"},
                {"Origin": "http://evil.example"},
            )
        )
        answer = await self._client.post(CHAT, headers=headers, json=self.talk(max_tokens=1))
        self._judge("stranger", answer)

    async def giant(self) -> None:
        """Send a prompt that no model takes, or no server."""
        size = self._draw.choice((60_000, 400_000, 1_500_000, 5_000_000))
        text = self._draw.choice(("a ", "word ", "\u00e9", "\U0001f600", "<|im_end|>", "\x00"))
        with contextlib.suppress(httpx.WriteError):  # refused while it was being sent
            await self._post(CHAT, self.talk() | {"messages": [
                {"role": "user", "content": (text * size)[:size]}
            ]})  # fmt: skip

    async def long(self) -> None:
        """Send a prompt of some hundred words, which models take."""
        text = " ".join(self._draw.choice(WORDS) for _ in range(self._draw.randrange(100, 350)))
        await self._post(CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 8})

    async def swap(self) -> None:
        """Have another model loaded, in one of the three ways."""
        model = self._draw.choice(self._models)
        match self._draw.randrange(3):
            case 0:
                await self._post("/v1/internal/model/load", {"model_name": model})
            case 1:
                await self._post("/api/v1/model", {"model": model}, method="PUT")
            case _:
                await self._post(CHAT, self.talk(model=model, max_tokens=2))

    async def complete(self) -> None:
        """Complete two prompts twice, in one of several ways."""
        body: dict[str, Any] = {"prompt": ["One", "Two two"], "max_tokens": 12, "n": 2}
        body |= self._draw.choice(({}, {"logprobs": 3}, {"echo": True, "logprobs": 1}, {"seed": 1}))
        await self._post(COMPLETE, body)

    async def kobold(self) -> None:
        """Ask as Kobold's clients do."""
        body = {"prompt": "Hello", "max_length": 20, "rep_pen": 1.1, "rep_pen_range": 64}
        if self._draw.random() < 0.5:
            await self._post("/api/v1/generate", body)
            return
        answer = await self._client.post("/api/extra/generate/stream", json=body)
        self._judge("kobold stream", answer)

    async def textgen(self) -> None:
        """Ask what text-generation-webui's clients ask."""
        path, body = self._draw.choice(
            (
                ("/v1/internal/encode", {"text": "Hello there"}),
                ("/v1/internal/decode", {"tokens": [1, 2, 3]}),
                ("/v1/internal/token-count", {"text": "x " * 5000}),
                ("/v1/internal/logits", {"prompt": "Hello"}),
                ("/api/extra/tokencount", {"prompt": "Hello"}),
            )
        )
        await self._post(path, body)

    async def abort(self) -> None:
        """Have a reply ended by its key while it is written; now and then, everyone's."""
        key = f"KCPP{self._draw.randrange(10**6)}"
        body = {"prompt": "Hello", "max_length": 400, "genkey": key}
        asked = asyncio.ensure_future(self._post("/api/v1/generate", body))
        await asyncio.sleep(self._draw.uniform(0, 0.5))
        await self._post("/api/extra/generate/check", {"genkey": key})
        await self._post("/api/extra/abort", {"genkey": key})
        if self._draw.random() < 0.1:
            await self._post("/v1/internal/stop-generation", None)
        await asked

    async def paths(self) -> None:
        """Name a model by a path."""
        own = self._models[0]
        name = self._draw.choice(
            ("../outside", f"{own}/..", f"{own}/../{own}", "/etc", "/etc/passwd", "~", ".", "",
             f"{own}\x00", "owner/repo", "owner/repo:../../x", "%2e%2e%2foutside", "C:\\x",
             "x" * 600)
        )  # fmt: skip
        await self._post(CHAT, self.talk(model=name, max_tokens=1))
        answer = await self._client.get("/v1/models/" + name.replace("\x00", "%00"))
        self._judge(f"model {name!r}", answer)

    async def look(self) -> None:
        """Look at what is only read."""
        for path in ("/health", "/metrics", "/v1/models", "/", "/v1/nothing", "/api/extra/perf"):
            self._judge(path, await self._client.get(path))

    async def grammar(self) -> None:
        """Ask for JSON, by a schema that nobody asked for before."""
        schema = {"type": "object", "properties": {"a": {"enum": [self._draw.randrange(99)]}}}
        named = {"name": "x", "schema": schema}
        shape = self._draw.choice(
            ({"type": "json_object"}, {"type": "json_schema", "json_schema": named})
        )
        await self._post(CHAT, self.talk(max_tokens=20, response_format=shape))
