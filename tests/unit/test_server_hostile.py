"""Nobody waits for another's request: what takes long runs on no thread that others wait for."""

from __future__ import annotations

import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from altered import DATA, ONE, copy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import CHAT, COMPLETE, OTHER, Running, load, running
from test_server_parts import TOOLS_TEMPLATE
from transformers import AutoTokenizer
from waiting import eventually

from gptq_loader_extensions.openai.replies import prompts
from gptq_loader_extensions.openai.replies.prompt_tokenizer import PromptTokenizer
from gptq_loader_plugin.errors import PromptTooLong
from gptq_loader_plugin.generation.batch import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import gptq_loader_plugin as gptq

ENGINE = "gptq-engine"
PROMPTS = "gptq-prompts-"
CONTROL = "<|im_end|>"
PRIVATE = "".join(map(chr, range(0xE000, 0xF900)))
TOO_LONG = "context_length_exceeded"
BIG = 3_900_000


class Threads:
    """A load whose models' tokenizers keep the names of the threads that call them."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.texts = 0  # characters that were tokenised

    def __call__(self, target: str | Path) -> gptq.LoadedModel:
        model = load(target)
        inner = type(model.tokenizer)
        threads = self

        class Watched(inner):  # type: ignore[misc, valid-type]
            def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
                threads.names.add(threading.current_thread().name)
                threads.texts += sum(map(len, [text] if isinstance(text, str) else text))
                return super().__call__(text, *args, **options)

        model.tokenizer.__class__ = Watched
        return model


@pytest.fixture(scope="module")
def threads() -> Threads:
    return Threads()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, threads: Threads) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("served")
    tools = copy(ONE, folder / "models" / "tools")
    (tools / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    with running(folder, names=(), start="tools", loads=threads, max_num_seqs=4) as it:
        threads.names.clear()  # those of the load
        yield it


def test_only_threads_of_their_own_make_prompts(served: Running, threads: Threads) -> None:
    schema = {"name": "x", "schema": {"type": "object", "properties": {"a": {"enum": ["b"]}}}}
    tool = {"type": "function", "function": {"name": "now"}}
    bodies: list[tuple[str, dict[str, Any]]] = [
        (CHAT, {"messages": [{"role": "user", "content": "Hello"}], "tools": [tool]}),
        (CHAT, {"messages": [{"role": "user", "content": f"Hello {CONTROL}{PRIVATE[:9]}"}]}),
        (
            CHAT,
            {
                "messages": [{"role": "user", "content": "Hello"}],
                "response_format": {"type": "json_schema", "json_schema": schema},
            },
        ),
        (COMPLETE, {"prompt": ["Hello", "you"], "echo": True, "logprobs": 1}),
        (COMPLETE, {"prompt": "Hello " * 900, "truncation_length": 100}),
        ("/api/v1/generate", {"prompt": "Hello", "memory": "you"}),
        ("/v1/internal/logits", {"prompt": "Hello"}),
        ("/v1/internal/encode", {"text": "Hello"}),
        ("/v1/internal/token-count", {"text": "Hello"}),
        ("/api/extra/tokencount", {"prompt": "Hello"}),
    ]
    for path, body in bodies:
        threads.texts = 0
        writes = path in (CHAT, COMPLETE, "/api/v1/generate")
        answer = served.post(path, **body, **({"max_tokens": 2} if writes else {}))
        assert answer.status_code == 200, (path, answer.text)
        assert threads.texts
    assert threads.names
    assert all(name.startswith(PROMPTS) for name in threads.names), threads.names


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a" * BIG}]}),
        (CHAT, {"messages": [{"role": "user", "content": CONTROL * (BIG // 10)}]}),
        (CHAT, {"messages": [{"role": "user", "content": PRIVATE * 190 + CONTROL}]}),
        (CHAT, {"messages": [{"role": "user", "content": f"{i} words"} for i in range(10_000)]}),
        (
            CHAT,
            {
                "messages": [
                    {"role": "system", "content": "a" * BIG},
                    {"role": "user", "content": "b"},
                ]
            },
        ),
        (COMPLETE, {"prompt": "a" * BIG}),
        (COMPLETE, {"prompt": ["a", "b" * BIG]}),
        (COMPLETE, {"prompt": CONTROL * (BIG // 10), "echo": True, "logprobs": 1}),
        ("/api/v1/generate", {"prompt": "a", "memory": "a" * BIG}),
        ("/v1/internal/logits", {"prompt": "a" * BIG}),
        ("/v1/internal/encode", {"text": "a" * BIG}),
        ("/v1/internal/token-count", {"text": " " * BIG}),
        ("/api/extra/tokencount", {"prompt": CONTROL * (BIG // 10)}),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_cannot_fit_is_refused_by_its_length(
    served: Running, threads: Threads, path: str, body: dict[str, Any]
) -> None:
    threads.texts = 0
    answer = served.post(path, **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == TOO_LONG
    assert "tokens or more. Please reduce" in answer.json()["error"]["message"]
    assert threads.texts < 10, "nothing of it was tokenised"


def test_a_long_prompt_is_cut_before_it_is_tokenised(served: Running, threads: Threads) -> None:
    words = " ".join(random.Random(3).choices(["stone", "river", "of", "the", "Ä🙂"], k=30_000))
    threads.texts = 0
    body = {"max_length": 8, "temperature": 0, "max_context_length": 200}
    (cut,) = served.post("/api/v1/generate", prompt=words, **body).json()["results"]
    assert threads.texts < len(words) / 4
    (short,) = served.post("/api/v1/generate", prompt=words[-4000:], **body).json()["results"]
    assert cut == short
    body = {"max_tokens": 8, "temperature": 0, "truncation_length": 200}
    whole = served.post(COMPLETE, prompt=words, **body).json()
    assert whole["choices"] == served.post(COMPLETE, prompt=words[-4000:], **body).json()["choices"]
    assert whole["usage"]["prompt_tokens"] == 192


CONTEXT = 20
TOKENIZER = PromptTokenizer(AutoTokenizer.from_pretrained(DATA / ONE), CONTEXT)
PARTS = st.sampled_from(["a", " ", "\n", "the ", CONTROL, "\x04", "é", "e\u0301", "🙂", "\ue000"])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(PARTS, max_size=200).map("".join) | st.text(max_size=400))
def test_no_text_that_fits_is_refused(text: str) -> None:
    count = len(TOKENIZER.tokenizer(text)["input_ids"])
    if count <= CONTEXT:
        TOKENIZER.check_length(text)
    elif len(text.replace("\x04", "")) > CONTEXT * (TOKENIZER.longest_token or 0):
        with pytest.raises(PromptTooLong) as refused:
            TOKENIZER.check_length(text)
        assert count >= refused.value.tokens > refused.value.context
    end = TOKENIZER.end_of(text, 5)
    assert text.endswith(end)
    assert end == text or len(TOKENIZER.tokenizer(end)["input_ids"]) > 5


@pytest.mark.parametrize(
    ("change", "bounded"),
    [
        ({}, True),
        ({"normalizer": {"type": "NFC"}}, True),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, False),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
            False,
        ),
        (
            {"normalizer": {"type": "Replace", "pattern": {"String": "aaa"}, "content": ""}},
            False,
        ),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, False),
        (
            {
                "pre_tokenizer": {
                    "type": "Split",
                    "pattern": {"String": " "},
                    "behavior": "Removed",
                    "invert": False,
                }
            },
            False,
        ),
    ],
)
def test_a_tokenizer_that_may_leave_text_out_has_no_bound(
    tmp_path: Path, change: dict[str, Any], bounded: bool
) -> None:
    folder = copy(ONE, tmp_path)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    tokenizer = PromptTokenizer(AutoTokenizer.from_pretrained(folder), context=20)
    assert (tokenizer.longest_token is not None) == bounded
    tokenizer.check_length(" " * 200)


class Held:
    """Prompts that wait for leave while they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, held: str) -> None:
        self.leave = threading.Event()
        self.began = threading.Semaphore(0)
        real = PromptTokenizer.__call__

        def call(tokenizer: PromptTokenizer, text: Any, **options: Any) -> Any:
            if held in text:
                self.began.release()
                assert self.leave.wait(timeout=60)
            return real(tokenizer, text, **options)

        monkeypatch.setattr(PromptTokenizer, "__call__", call)


def test_a_prompt_that_takes_long_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large prompt is held for ever: streams go on, and small ones are begun."""
    held = Held(monkeypatch, held="slow")
    large = {"prompt": ["slow", "b" * 50_000], "max_tokens": 2}
    with (
        running(tmp_path, names=(ONE,), max_num_seqs=4, max_queue=3) as served,
        ThreadPoolExecutor(4) as pool,
    ):
        try:
            slow = pool.submit(served.post, COMPLETE, **large)
            assert held.began.acquire(timeout=60)
            health = served.client.get("/health").json()
            assert (health["running"], health["waiting"]) == (0, 1)
            for _ in range(3):
                assert served.chat(max_tokens=20).status_code == 200
                assert served.post("/v1/internal/token-count", text="x").status_code == 200
            more = [pool.submit(served.post, COMPLETE, **large) for _ in range(2)]
            eventually(
                lambda: served.client.get("/health").json()["waiting"] == 3, awaited="three to wait"
            )
            refused = served.chat(max_tokens=2)
            assert refused.status_code == 429, "what is prepared counts"
            assert refused.json()["error"]["code"] == "queue_full"
            assert served.client.post("/v1/internal/stop-generation").status_code == 200
            for it in (slow, *more):
                assert it.result().json()["error"]["code"] == "stopped", "its place is free again"
            assert served.client.get("/health").json()["waiting"] == 0
            assert served.chat(max_tokens=2).status_code == 200
        finally:
            held.leave.set()
        assert served.post(COMPLETE, prompt="slow", max_tokens=2).status_code == 200


def test_a_client_that_leaves_while_its_prompt_is_made_gives_its_place_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, held="slow")
    with running(tmp_path, names=(ONE,)) as served:
        try:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(served.url + COMPLETE, json={"prompt": "slow"}, timeout=0.5)
            assert held.began.acquire(timeout=60)
            eventually(
                lambda: served.client.get("/health").json()["waiting"] == 0, awaited="its place"
            )
        finally:
            held.leave.set()
        assert served.post(COMPLETE, prompt="slow", max_tokens=2).status_code == 200


def test_a_swap_waits_for_prompts_before_it_and_those_behind_have_the_new_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, held="slow")
    ask = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
    with running(tmp_path, max_num_seqs=4) as served, ThreadPoolExecutor(3) as pool:
        try:
            answers = [pool.submit(served.post, COMPLETE, prompt="slow", max_tokens=2)]
            assert held.began.acquire(timeout=60)
            answers.append(pool.submit(served.post, CHAT, model=OTHER, **ask))
            eventually(
                lambda: served.client.get("/health").json()["waiting"] == 2, awaited="the swap"
            )
            answers.append(pool.submit(served.post, CHAT, **ask))
            eventually(
                lambda: served.client.get("/health").json()["waiting"] == 3, awaited="all three"
            )
            assert served.client.get("/health").json()["model"] == ONE
        finally:
            held.leave.set()
        assert [it.result().json()["model"] for it in answers] == [ONE, OTHER, OTHER]


def test_prompts_are_scored_between_the_tokens_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    score, step = prompts.score_tokens, Batch.step

    def scored(*args: Any) -> Any:
        events.append("score")
        return score(*args)

    def stepped(batch: Batch) -> Any:
        events.append("step")
        return step(batch)

    monkeypatch.setattr(prompts, "CHUNK", 8)
    monkeypatch.setattr(prompts, "score_tokens", scored)
    monkeypatch.setattr(Batch, "step", stepped)
    body = {"prompt": ["word " * 60] * 4, "echo": True, "logprobs": 1, "max_tokens": 0}
    with running(tmp_path, names=(ONE,)) as served:
        assert served.post(COMPLETE, **body).status_code == 200
    assert events.count("score") > 8
    assert "score score" not in " ".join(events), "others have their turn between two chunks"


# Connections


def test_clients_that_never_send_or_never_read_keep_nobody_waiting(served: Running) -> None:
    address = httpx.URL(served.url)
    where = (address.host, address.port or 80)
    half = b"POST " + COMPLETE.encode() + b" HTTP/1.1\r\nHost: localhost\r\n"
    silent = half + b"Content-Type: application/json\r\nContent-Length: 5000\r\n\r\n{"
    body = json.dumps({"prompt": "x", "max_tokens": 300, "stream": True}).encode()
    unread = half + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body), body
    )  # fmt: skip
    connections = []
    try:
        for text in [half] * 30 + [silent] * 30 + [unread] * 8:
            connections.append(socket.create_connection(where, timeout=60))
            connections[-1].sendall(text)
        for _ in range(3):
            assert served.chat(max_tokens=2).status_code == 200
    finally:
        for connection in connections:
            connection.close()
    eventually(
        lambda: (
            served.client.get("/health").json()
            == served.client.get("/health").json() | {"running": 0, "waiting": 0}
        ),
        awaited="all of them to end",
    )
