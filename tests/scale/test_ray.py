"""Replicas on Ray Serve: what clients see, also when a replica is killed under them."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import yaml
from altered import DATA
from environments import ROOT, needs_python_of, python_of
from processes import ServerProcess, run_process, start_process
from ray_process import END, KEY, START, command, environ, load, processes_of, replicas, serving
from waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.host("ray"),
    pytest.mark.timeout(1800),  # seconds: a start alone may take ten minutes
    needs_python_of("ray"),
]

NAME = "gptq-4bit-32g-act-sym"
MODEL = os.environ.get("GPTQ_SCALE_MODEL") or str(DATA / NAME)
HEADERS = {"Authorization": f"Bearer {KEY}"}
BEGIN = '{"time"'  # of a request's line
LONG = 400  # tokens; the tiny checkpoint's context is 512
MINUTES = 3  # for a replica to be replaced, on a machine with other work


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving(MODEL, "--replicas", "2") as server:
        yield server


def ask(server: ServerProcess, **options: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 16}
    with httpx.Client(timeout=120, headers=HEADERS) as client:
        return client.post(f"{server.url}/v1/chat/completions", json={**body, **options})


def get(server: ServerProcess, path: str) -> httpx.Response:
    with httpx.Client(timeout=60, headers=HEADERS) as client:
        return client.get(f"{server.url}{path}")


def logged(server: ServerProcess) -> list[dict[str, Any]]:
    """Read what the replicas wrote of each request."""
    files = Path(server.ready["logs"]).glob("replica_*.log")
    lines = [line for it in files for line in it.read_text(encoding="utf-8").splitlines()]
    return [json.loads(it[it.index(BEGIN) :]) for it in lines if BEGIN in it]


@contextmanager
def long_reply(server: ServerProcess) -> Iterator[Iterator[str]]:
    body = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
    with (
        httpx.Client(timeout=120, headers=HEADERS) as client,
        client.stream(
            "POST",
            f"{server.url}/v1/chat/completions",
            json={**body, "stream": True, "max_tokens": LONG},
        ) as answer,
    ):
        yield answer.iter_lines()


def test_an_openai_client_chats_and_streams(server: ServerProcess) -> None:
    with load(server, clients=2, seconds=2, tokens=16) as clients:
        requests = json.loads(clients.communicate(timeout=120)[0])
    assert not [it for it in requests if it["error"]]
    assert {it["text"] for it in requests} == {requests[0]["text"]}, (
        "streamed or whole, from any replica"
    )
    assert {it["tokens"] for it in requests} == {16}
    assert {it["stream"] for it in requests} == {True, False}


def test_it_says_what_it_serves_and_nothing_else(server: ServerProcess) -> None:
    assert server.ready["replicas"] == [2, 2]
    assert len(replicas(server)) == 2
    assert server.log.startswith(f"serving {server.ready['model']}: ")
    assert "replicas on Ray Serve: 2, 1 thread(s) each" in server.log
    assert server.log.endswith("Ctrl-C ends it\n"), "Ray's own logs are in a folder"
    health = get(server, "/health")
    assert health.json()["status"] == "ok"
    assert health.json()["model"] == server.ready["model"]
    assert [it["id"] for it in get(server, "/v1/models").json()["data"]] == [server.ready["model"]]


def names(server: ServerProcess) -> set[str]:
    """Ask until both replicas have answered."""
    seen: set[str] = set()

    def both() -> bool:
        seen.add(get(server, "/health").headers["x-replica"])
        return len(seen) == 2

    eventually(both, END, awaited="an answer of each replica")
    return seen


def test_both_replicas_answer(server: ServerProcess) -> None:
    assert len(names(server)) == 2


def test_the_key_is_asked_for(server: ServerProcess) -> None:
    with httpx.Client(timeout=60) as client:
        assert client.get(f"{server.url}/v1/models").status_code == 401
        answer = client.post(f"{server.url}/v1/chat/completions", json={})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert len(answer.headers.get_list("x-request-id")) == 1


def test_a_request_may_be_wrong(server: ServerProcess) -> None:
    answer = ask(server, temprature=1)
    assert answer.status_code == 400
    assert "temprature" in answer.json()["error"]["message"]


def test_a_client_that_hangs_up_ends_its_reply(server: ServerProcess) -> None:
    with long_reply(server) as lines:
        for _ in range(4):
            next(lines)
    eventually(
        lambda: not any(get(server, "/health").json()["running"] for _ in range(8)),
        END,
        awaited="the end of the reply",
    )
    assert [it for it in logged(server) if it.get("finish", "") is None], "it was not cut short"


def successor(server: ServerProcess, before: set[str]) -> float:
    """Ask until a replica answers that was not there before; say when it did."""
    eventually(
        lambda: get(server, "/health").headers.get("x-replica") not in {None, *before},
        60 * MINUTES,
        awaited="another replica",
    )
    return time.time()


@pytest.mark.parametrize("count", [2, 16])
def test_a_killed_replica_is_replaced_and_no_request_is_lost(
    server: ServerProcess, count: int
) -> None:
    before = names(server)
    with load(server, clients=count, seconds=60, tokens=LONG) as clients:
        time.sleep(5)
        victim = replicas(server)[0]
        killed = time.time()
        victim.kill()
        recovered = successor(server, before)
        requests = json.loads(clients.communicate(timeout=60 * MINUTES)[0])
    failed = [it for it in requests if it["error"]]
    print(  # noqa: T201 - pytest -rP
        f"{count} clients: {len(requests)} requests, {len(failed)} errors "
        f"({sorted({it['error'] for it in failed})}), slowest "
        f"{max(it['ended'] - it['began'] for it in requests):.1f} s; the new replica's first "
        f"answer {recovered - killed:.1f} s later"
    )
    assert {it["error"] for it in failed} <= {"replica_lost"}
    assert all(it["stream"] and it["began"] < killed < it["ended"] for it in failed), (
        "what had not begun was asked again by the proxy"
    )
    assert len(failed) <= count // 2
    assert victim.pid not in {it.pid for it in replicas(server)}


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_running_replies_end_before_the_server_does(sent: signal.Signals) -> None:
    with serving(MODEL, "--replicas", "1", "--grace", "60") as server:
        started = processes_of(server)
        with long_reply(server) as lines:
            received = [next(lines) for _ in range(4)]
            server.process.send_signal(sent)
            received += [*lines]
        events = [json.loads(it[6:]) for it in received if it.startswith("data: {")]
        assert received[-2:] == ["data: [DONE]", ""]
        assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert server.process.wait(timeout=END) == 0
    gone, left = psutil.wait_procs(started, timeout=END)
    assert not left, left
    assert len(gone) > 5


def test_what_no_replica_can_load_is_said_in_two_lines() -> None:
    failed = run_process(command(MODEL, "--template", "nonsense"), env=environ(), seconds=START)
    assert failed.returncode == 1
    assert failed.stderr.splitlines() == [
        "error: the replicas could not start: no template is called 'nonsense'",
        "hint: name one of chatml, checkpoint, card, or a .jinja file",
    ]


def test_others_are_kept_out_unless_asked_in() -> None:
    env = {name: value for name, value in environ().items() if name != "GPTQ_LOADER_API_KEY"}
    refused = run_process(command(MODEL, "--listen"), env=env, seconds=60)
    assert refused.returncode == 1
    assert "could use this server" in refused.stderr
    assert "hint: set a key with --api-key" in refused.stderr


def test_replicas_come_when_there_is_much_to_do() -> None:
    with serving(MODEL, "--replicas", "1-2", "--max-num-seqs", "4") as server:
        assert server.ready["replicas"] == [1, 2]
        assert len(replicas(server)) == 1
        with load(server, clients=12, seconds=90, tokens=LONG) as clients:
            requests = json.loads(clients.communicate(timeout=60 * MINUTES)[0])
    assert not [it for it in requests if it["error"]]
    assert len({it["replica"] for it in requests}) == 2


def test_too_many_are_told_to_come_again() -> None:
    with (
        serving(MODEL, "--replicas", "1", "--max-num-seqs", "1", "--max-queue", "1") as server,
        ThreadPoolExecutor(24) as threads,
    ):
        answers = list(threads.map(lambda _: ask(server, max_tokens=LONG), range(24)))
    refused = [it for it in answers if it.status_code == 429]
    assert {it.status_code for it in answers} == {200, 429}
    assert {it.json()["error"]["code"] for it in refused} == {"queue_full"}
    assert all(int(it.headers["retry-after"]) > 0 for it in refused)


def test_a_cluster_deploys_the_example(tmp_path: Path) -> None:
    """By `serve run`, which deploys a file on a Ray of this machine that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = yaml.safe_load((ROOT / "examples" / "ray.yaml").read_text(encoding="utf-8"))
    config["http_options"] |= {"host": "127.0.0.1", "port": port}
    config["applications"][0]["args"] |= {"reference": MODEL, "replicas": 1, "threads": 1}
    file = tmp_path / "ray.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    program = Path(str(python_of("ray"))).with_name("serve")
    log = tmp_path / "log"
    with (
        log.open("w") as written,
        start_process(
            [str(program), "run", str(file)],
            env={**environ(), "RAY_USAGE_STATS_ENABLED": "0"},
            cwd=tmp_path,
            stdout=written,
            stderr=written,
        ) as process,
    ):
        server = ServerProcess(process, {"url": f"http://127.0.0.1:{port}"})
        try:
            eventually(lambda: answers(server), START, awaited="the application", log=log.read_text)
            answer = ask(server)
            assert answer.json()["usage"]["completion_tokens"] == 16
            assert answer.headers["x-replica"]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=END)


def answers(server: ServerProcess) -> bool:
    assert server.process.poll() is None
    try:
        return get(server, "/health").status_code == 200
    except httpx.TransportError:
        return False
