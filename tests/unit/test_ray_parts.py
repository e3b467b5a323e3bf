"""What the host on Ray Serve does by itself: its options, and what its proxy says."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

import gptq_loader_plugin as gptq
from gptq_loader_extensions.openai.schema.paths import CHAT, REPLY_PATHS
from gptq_loader_extensions.ray import RayHost
from gptq_loader_extensions.ray.options import parse_options
from gptq_loader_extensions.ray.proxy import TRIES, RetryMiddleware
from gptq_loader_plugin.host import Engine

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

JSON = [(b"content-type", b"application/json")]
PLAIN = [(b"content-type", b"text/plain")]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]


def start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(content: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": content, "more_body": more}


class Proxy:
    """Ray Serve's proxy: each request is answered as the next of `answers` says."""

    def __init__(self, *answers: list[Message]) -> None:
        self.answers = list(answers)
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        content = b""
        while True:
            message = await receive()
            content += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(content)
        for it in self.answers.pop(0):
            await send(it)


def ask(
    app: ASGIApp, *, path: str = CHAT, receive: Callable[[], Any] | None = None
) -> tuple[int | None, dict[bytes, bytes], bytes]:
    sent: list[Message] = []
    parts = [
        {"type": "http.request", "body": b"par", "more_body": True},
        {"type": "http.request", "body": b"ts"},
    ]

    async def from_client() -> Message:
        if parts:
            return parts.pop(0)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": path, "method": "POST", "headers": []}
    with ThreadPoolExecutor(1) as thread:  # in this one, a loop that gradio has made would be lost
        thread.submit(
            asyncio.run, RetryMiddleware(app)(scope, receive or from_client, send)
        ).result()
    status = sent[0]["status"] if sent else None
    headers = dict(sent[0]["headers"]) if sent else {}
    return status, headers, b"".join(it.get("body", b"") for it in sent)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_loader_extensions.ray.proxy.PAUSE", 0)


def test_what_was_not_answered_is_asked_again_word_for_word() -> None:
    proxy = Proxy([], [], [start(200, JSON), body(b"{}")])
    assert ask(proxy) == (200, dict(JSON), b"{}")
    assert proxy.bodies == [b"parts"] * 3


@pytest.mark.parametrize("prefix", ["", "/of-the-application"])
@pytest.mark.parametrize("path", REPLY_PATHS)
def test_every_route_that_writes_replies_is_asked_again(path: str, prefix: str) -> None:
    proxy = Proxy([], [start(200, JSON), body(b"{}")])
    assert ask(proxy, path=prefix + path) == (200, dict(JSON), b"{}")


def test_what_cannot_be_answered_may_be_asked_again_later() -> None:
    proxy = Proxy(*([] for _ in range(TRIES)))
    status, headers, content = ask(proxy)
    assert (status, headers[b"retry-after"]) == (503, b"5")
    assert json.loads(content)["error"]["code"] == "replica_lost"


def test_half_a_stream_ends_in_words() -> None:
    proxy = Proxy([start(200, EVENTS), body(b"data: {}\n\n", more=True)])
    status, _, content = ask(proxy)
    first, error, done, _ = content.decode().split("\n\n")
    assert (status, first, done) == (200, "data: {}", "data: [DONE]")
    assert json.loads(error[6:])["error"]["code"] == "replica_lost"
    assert len(proxy.bodies) == 1, "what a client has seen the beginning of is not begun again"


def test_a_whole_stream_is_left_as_it_is() -> None:
    proxy = Proxy([start(200, EVENTS), body(b"data: {}\n\n", more=True), body(b"")])
    assert ask(proxy) == (200, dict(EVENTS), b"data: {}\n\n")


@pytest.mark.parametrize(
    ("refused", "answered", "code"),
    [
        (429, 429, "queue_full"),
        (503, 503, "not_ready"),
        (404, 503, "not_ready"),
        (408, 504, "timeout"),
    ],
)
def test_what_the_proxy_refuses_is_said_as_the_server_says_it(
    refused: int, answered: int, code: str
) -> None:
    status, _, content = ask(Proxy([start(refused, PLAIN), body(b"No.")]))
    assert (status, json.loads(content)["error"]["code"]) == (answered, code)


def test_what_the_server_refuses_is_passed_on() -> None:
    refusal = [start(404, JSON), body(b'{"error": {}}')]
    assert ask(Proxy(refusal)) == (404, dict(JSON), b'{"error": {}}')


def test_other_routes_are_not_touched() -> None:
    assert ask(Proxy([start(429, PLAIN), body(b"No.")]), path="/orders") == (
        429,
        dict(PLAIN),
        b"No.",
    )


def test_nobody_is_asked_for_a_client_that_has_gone() -> None:
    async def gone() -> Message:
        return {"type": "http.disconnect"}

    proxy = Proxy([])
    assert ask(proxy, receive=gone) == (None, {}, b"")
    assert len(proxy.bodies) == 1


def test_a_request_has_one_number() -> None:
    headers = [*JSON, (b"x-request-id", b"req-1"), (b"X-Request-ID", b"of the proxy")]
    assert ask(Proxy([start(200, headers), body(b"{}")]))[1] == {
        **dict(JSON),
        b"x-request-id": b"req-1",
    }


@pytest.mark.parametrize(
    ("text", "minimum", "maximum"), [("1", 1, 1), (3, 3, 3), ("1-4", 1, 4), ("2-2", 2, 2)]
)
def test_replicas_are_a_number_or_a_range(text: object, minimum: int, maximum: int) -> None:
    options = parse_options({"reference": "demo", "replicas": text}, environ={})
    assert options.replica_range() == (minimum, maximum)


@pytest.mark.parametrize("text", ["0", "4-1", "many", "1-", "-2", 0])
def test_no_other_number_of_replicas_is_taken(text: object) -> None:
    with pytest.raises(gptq.OptionInvalid, match="is not a number of replicas") as caught:
        parse_options({"reference": "demo", "replicas": text}, environ={})
    assert "1-4" in caught.value.hint


def test_options_are_those_there_are() -> None:
    with pytest.raises(gptq.OptionInvalid, match="there is no option 'replica'") as caught:
        parse_options({"reference": "demo", "replica": 2}, environ={})
    assert "replicas" in caught.value.hint
    with pytest.raises(gptq.OptionInvalid, match="threads: "):
        parse_options({"reference": "demo", "threads": 0}, environ={})


def test_the_key_may_be_in_the_environment_and_is_not_shown() -> None:
    options = parse_options({"reference": "demo"}, environ={"GPTQ_LOADER_API_KEY": "a-secret"})
    assert options.settings().api_key == "a-secret"
    assert "a-secret" not in repr(options)


def test_every_option_it_takes_is_read() -> None:
    from gptq_loader_plugin.cli.serve import serve

    known = set(serve.__annotations__)
    assert RayHost().takes <= known
    assert isinstance(RayHost(), Engine)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_without_ray_it_says_what_to_install() -> None:
    with pytest.raises(gptq.PluginError, match="ray is not installed") as caught:
        RayHost().serve("demo")
    assert "pip install 'gptq-loader-plugin[ray]'" in caught.value.hint
