"""Many clients, one model: the queue, deadlines, cancellation, swaps, and running out of memory."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from altered import DATA, ONE
from served import CHAT, COMPLETE, OTHER, Brake, Running, load, running
from waiting import eventually

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from pathlib import Path

ASK = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}


def until(served: Running, *, running: int | None = None, waiting: int | None = None) -> None:
    """Wait until as many run and wait as are named."""

    def reached() -> bool:
        health = served.client.get("/health").json()
        return running in (None, health["running"]) and waiting in (None, health["waiting"])

    eventually(reached, awaited=f"{running} replies to run and {waiting} to wait")


def test_everyone_gets_the_text_they_would_get_alone(tmp_path: Path) -> None:
    prompts = [f"Tell me about number {i}" * (1 + i % 4) for i in range(20)]
    with (
        running(tmp_path, names=(ONE,), max_num_seqs=8) as served,
        load(tmp_path / "models" / ONE) as model,
    ):
        options = gptq.GenerateOptions(max_new_tokens=40, temperature=0)
        alone = [model.generate(it, options).text for it in prompts]

        def ask(prompt: str) -> str:
            answer = served.post(COMPLETE, prompt=prompt, max_tokens=40, temperature=0)
            return str(answer.json()["choices"][0]["text"])

        with ThreadPoolExecutor(20) as pool:
            assert list(pool.map(ask, prompts)) == alone


def test_sixteen_clients_share_the_steps_of_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"Tell me about number {i}" for i in range(16)]
    options = gptq.GenerateOptions(max_new_tokens=24, temperature=0)
    with load(DATA / ONE) as model:
        alone = [model.generate(it, options).text for it in prompts]
    monkeypatch.setenv("GPTQ_LOADER_ENGINE", "1")
    steps: list[int] = []

    def watched(target: str | Path) -> gptq.LoadedModel:
        model = load(target)
        assert model.engine is not None
        step = model.engine.step

        def counted(tokens: Any, caches: Any, lengths: Any, **more: Any) -> Any:
            steps.append(len(tokens))
            return step(tokens, caches, lengths, **more)

        monkeypatch.setattr(model.engine, "step", counted)
        return model

    with running(tmp_path, names=(ONE,), loads=watched, max_num_seqs=16) as served:

        def ask(prompt: str) -> str:
            answer = served.post(COMPLETE, prompt=prompt, max_tokens=24, temperature=0)
            return str(answer.json()["choices"][0]["text"])

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, prompts)) == alone
    assert max(steps) > 8
    assert sum(steps) / len(steps) > 3  # prompts' parts, one sequence each, included


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    brake = Brake()
    with running(tmp_path, names=(ONE,), loads=brake, max_queue=2) as served:
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(served.chat, max_tokens=20, temperature=0)]
            brake.wait_for_reply()
            answers += [pool.submit(served.chat, max_tokens=20, temperature=0) for _ in range(2)]
            until(served, running=1, waiting=2)
            refused = served.chat(max_tokens=1)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert int(refused.headers["retry-after"]) > 0
            brake.let_go()
            texts = {it.result().json()["choices"][0]["message"]["content"] for it in answers}
        assert len(texts) == 1


def test_requests_are_answered_in_the_order_they_came(tmp_path: Path) -> None:
    brake = Brake()
    with running(tmp_path, names=(ONE,), loads=brake) as served:
        with ThreadPoolExecutor(4) as pool:
            for i in range(4):
                pool.submit(served.chat, max_tokens=3 + i, temperature=0)
                until(served, running=1, waiting=i)
            brake.let_go()
        lines = eventually(  # the last is written after the answer
            lambda: len(served.lines) >= 4 and served.lines, awaited="four lines in the log"
        )
        assert [it["tokens"] for it in lines if it["route"] == CHAT] == [3, 4, 5, 6]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_reply_within_a_token(tmp_path: Path, stream: bool) -> None:
    brake = Brake()
    with running(tmp_path, names=(ONE,), loads=brake) as served:
        if stream:
            brake.leave.release(3)
            with served.client.stream(
                "POST", CHAT, json={**ASK, "max_tokens": 400, "stream": True}
            ) as answer:
                lines = answer.iter_lines()
                for _ in range(4):
                    next(lines)
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(served.url + CHAT, json={**ASK, "max_tokens": 400}, timeout=0.5)
        eventually(
            lambda: any(line["route"] == CHAT for line in served.lines),
            awaited="the line of the request in the log",
        )
        brake.leave.release(2)  # one for the token under way, and none to spare
        until(served, running=0, waiting=0)
        assert brake.cancelled == 1
        (line,) = [it for it in served.lines if it["route"] == CHAT]
        assert line["status"] == (200 if stream else 499)
        brake.let_go()
        assert served.chat(max_tokens=2).status_code == 200


def test_a_client_that_hangs_up_while_it_waits_leaves_the_queue(tmp_path: Path) -> None:
    brake = Brake()
    with running(tmp_path, names=(ONE,), loads=brake) as served:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(served.chat, max_tokens=20)
            brake.wait_for_reply()
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(served.url + CHAT, json={**ASK, "max_tokens": 20}, timeout=0.3)
            until(served, running=1, waiting=0)
            brake.let_go()
            assert first.result().status_code == 200
        began = [brake.began.acquire(blocking=False) for _ in range(2)]
        assert began == [False, False], "the second one never began"


def test_a_request_has_a_deadline_wherever_it_is(tmp_path: Path) -> None:
    brake = Brake()
    with running(tmp_path, names=(ONE,), loads=brake, timeout=1.0) as served:
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(served.chat, max_tokens=400)]
            brake.wait_for_reply()
            answers.append(pool.submit(served.chat, max_tokens=4))
            for it in answers:
                answer = it.result()
                assert answer.status_code == 504
                assert answer.json()["error"]["code"] == "timeout"
        brake.leave.release(2)
        until(served, running=0, waiting=0)
        assert brake.cancelled == 1
        brake.leave.release(2)
        events = served.events(CHAT, **ASK, max_tokens=400)
        assert events[-1] == "[DONE]"
        assert events[-2]["error"]["code"] == "timeout", "a stream tells it in an event"
        brake.let_go()
        until(served, running=0)
        assert served.chat(max_tokens=2).status_code == 200


def test_a_swap_waits_for_the_reply_before_it(tmp_path: Path) -> None:
    brake = Brake()
    with running(tmp_path, loads=brake) as served, ThreadPoolExecutor(2) as pool:
        first = pool.submit(served.chat, max_tokens=20, temperature=0)
        brake.wait_for_reply()
        second = pool.submit(served.chat, model=OTHER, max_tokens=5, temperature=0)
        until(served, running=1, waiting=1)
        assert served.client.get("/health").json()["model"] == ONE
        brake.let_go()
        assert first.result().json()["model"] == ONE
        assert first.result().json()["usage"]["completion_tokens"] == 20
        assert second.result().json()["model"] == OTHER


def test_everything_can_be_stopped(tmp_path: Path) -> None:
    brake = Brake()
    with running(tmp_path, names=(ONE,), loads=brake) as served, ThreadPoolExecutor(2) as pool:
        brake.leave.release(2)
        answers = [pool.submit(served.chat, max_tokens=400, n=3)]
        brake.wait_for_reply()
        answers.append(pool.submit(served.chat, max_tokens=400))
        until(served, running=1, waiting=1)
        assert served.client.post("/v1/internal/stop-generation").json() == "OK"
        brake.leave.release(2)
        answer = answers[0].result().json()
        assert [it["finish_reason"] for it in answer["choices"]] == ["stop"] * 3
        assert answers[1].result().json()["error"]["code"] == "stopped"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_running_out_of_memory_ends_one_request(tmp_path: Path, error: Exception) -> None:
    fail = threading.Event()

    def loads(target: str | Path) -> gptq.LoadedModel:
        model = load(target)
        freely = model.begin

        def failing(*args: Any, **options: Any) -> Any:
            if fail.is_set():
                raise error
            return freely(*args, **options)

        model.begin = failing  # type: ignore[method-assign]
        return model

    with running(tmp_path, names=(ONE,), loads=loads) as served:
        before = served.chat(max_tokens=5, temperature=0).json()["choices"]
        fail.set()
        answer = served.chat(max_tokens=5)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "out_of_memory"
        fail.clear()
        assert served.chat(max_tokens=5, temperature=0).json()["choices"] == before


def test_a_model_too_large_for_this_machine_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    loaded: list[str] = []

    def loads(target: str | Path) -> gptq.LoadedModel:
        loaded.append(str(target))
        return load(target)

    with running(tmp_path, loads=loads) as served:
        real = psutil.virtual_memory()
        held = served.server.registry.loaded
        assert held is not None
        missing = real._replace(available=1000 - held[1].plan.weight_bytes)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: missing)
        answer = served.chat(model=OTHER, max_tokens=1)
        assert answer.status_code == 503
        assert "of memory, and 1 kB is free" in answer.json()["error"]["message"]
        assert len(loaded) == 1
        assert served.client.get("/health").json()["model"] == ONE, "the other one stays"
        monkeypatch.undo()
        assert served.chat(model=ONE, max_tokens=1).status_code == 200


def test_a_fault_is_told_without_its_words_and_the_next_request_is_answered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fail = threading.Event()

    def loads(target: str | Path) -> gptq.LoadedModel:
        model = load(target)
        freely = model.encode

        def failing(prompt: str) -> list[int]:
            if fail.is_set():
                raise ZeroDivisionError("a fault of ours")
            return freely(prompt)

        model.encode = failing  # type: ignore[method-assign]
        return model

    with running(tmp_path, names=(ONE,), loads=loads) as served:
        fail.set()
        answer = served.post(COMPLETE, prompt="", max_tokens=2)
        assert answer.status_code == 500
        assert "a fault" not in answer.text
        assert "ZeroDivisionError" in caplog.text
        fail.clear()
        assert served.post(COMPLETE, prompt="", max_tokens=2).status_code == 200
