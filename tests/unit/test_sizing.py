"""`examples/sizing.py` against what queueing theory knows exactly."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from processes import run_process

PROGRAM = Path(__file__).parents[2] / "examples" / "sizing.py"
MEASURED = ((1, 0.0145), (8, 0.022), (16, 0.0275), (32, 0.028))
STEP = 0.01


@pytest.fixture(scope="module")
def sizing() -> Any:
    spec = importlib.util.spec_from_file_location("sizing", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sizing"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def one_at_a_time(sizing: Any) -> Any:
    return sizing.Replica(steps=((1, STEP),), prompt_speed=1e9, most=1)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_and_replies_of_one_length(sizing: Any, load: float) -> None:
    """M/D/1: the mean wait is load · service / (2 · (1 - load))."""
    service = 100 * STEP
    work = sizing.Work(prompt=0, tokens=101, vary=False)
    seen = sizing.simulate(one_at_a_time(sizing), work, rate=load / service, count=40_000)
    assert mean(seen.first) == pytest.approx(load * service / (2 * (1 - load)), rel=0.1)
    assert mean(seen.whole) - mean(seen.first) == pytest.approx(service)
    assert seen.busy / seen.seconds == pytest.approx(load, rel=0.05)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_and_replies_of_any_length(sizing: Any, load: float) -> None:
    """M/M/1, nearly: a request is there for service / (1 - load) in the mean."""
    service = 199 * STEP
    work = sizing.Work(prompt=0, tokens=200)
    seen = sizing.simulate(one_at_a_time(sizing), work, rate=load / service, count=40_000)
    assert mean(seen.whole) == pytest.approx(service / (1 - load), rel=0.15)


@pytest.mark.parametrize("rate", [0.2, 1.0, 1.8])
def test_littles_law(sizing: Any, rate: float) -> None:
    """How many are there is how many come a second, times how long each is there."""
    replica = sizing.Replica(MEASURED, prompt_speed=1300)
    seen = sizing.simulate(replica, sizing.Work(), rate=rate, count=10_000)
    came = len(seen.whole) / seen.seconds
    assert came == pytest.approx(rate, rel=0.05)
    assert seen.ongoing == pytest.approx(came * mean(seen.whole), rel=0.03)
    assert seen.tokens / seen.seconds == pytest.approx(rate * 200, rel=0.06)
    assert seen.busy <= seen.seconds * 1.0001


@pytest.mark.parametrize("clients", [1, 4, 16, 40])
def test_clients_who_never_pause(sizing: Any, clients: int) -> None:
    """They are all there all the time, and get what a step of so many gives."""
    replica = sizing.Replica(MEASURED, prompt_speed=1e9)
    work = sizing.Work(prompt=1, tokens=101, vary=False)
    seen = sizing.simulate(replica, work, clients=clients, count=4000)
    together = min(clients, replica.most)
    assert seen.tokens / seen.seconds == pytest.approx(together / replica.step(together), rel=0.03)
    assert seen.ongoing == pytest.approx(clients, rel=0.03)
    assert mean(seen.each) == pytest.approx(replica.step(together), rel=0.02)


def test_a_prompt_is_read_in_parts_while_others_wait(sizing: Any) -> None:
    replica = sizing.Replica(((1, STEP),), prompt_speed=1000, most=2)
    work = sizing.Work(prompt=1000, tokens=11, vary=False)
    alone = sizing.simulate(replica, work, clients=1, count=50)
    assert alone.first[0] == pytest.approx(1.0)
    assert alone.whole[0] == pytest.approx(1.0 + 10 * STEP)
    beside = sizing.simulate(replica, work, clients=2, count=50)
    assert {round(it, 6) for it in beside.first} == {1.0, 2.0}, "one prompt after the other"
    come_and_go = sizing.simulate(replica, work, rate=0.5, count=500)
    assert max(come_and_go.each) > 0.256 / 10, "a token waits for a part of another's prompt"


def test_a_step_lies_between_those_measured(sizing: Any) -> None:
    replica = sizing.Replica(MEASURED, prompt_speed=1300)
    steps = [replica.step(it) for it in range(40)]
    assert steps[0] == 0
    assert steps[1] == steps[8] - 7 * (steps[8] - steps[1]) / 7 == 0.0145
    assert steps[16] == 0.0275
    assert steps[1:] == sorted(steps[1:])


def test_what_one_replica_can_take_is_below_what_its_steps_give(sizing: Any) -> None:
    replica, work = sizing.Replica(MEASURED, prompt_speed=1300), sizing.Work()
    limit = replica.most / replica.step(replica.most) / work.tokens
    patient = sizing.most_requests(replica, work, first=5, each=0.2)
    hurried = sizing.most_requests(replica, work, first=0.3, each=0.2)
    assert 0 < hurried < patient < limit
    assert sizing.most_requests(replica, work, first=0.01, each=0.2) == 0


def test_more_users_need_more_replicas_of_a_size() -> None:
    words = [sys.executable, str(PROGRAM), "--json", "--users", "1,1000,100000"]
    rows = json.loads(run_process(words, check=True).stdout)
    assert rows[0]["replicas"] == rows[0]["machines"] == 1
    assert rows[0]["busy"] < 0.1
    assert rows[2]["replicas"] > 50 * rows[1]["replicas"]
    assert all(row["first_seconds"][1] <= 2.2 for row in rows)
    assert rows[0]["replica_mb"] == pytest.approx(500 + 115 + 16 * 400 * 23040 / 2**20)


def test_what_is_too_slow_alone_is_said_so() -> None:
    words = [sys.executable, str(PROGRAM), "--each-token", "0.001"]
    completed = run_process(words)
    assert completed.returncode == 1
    assert "error: even one request" in completed.stderr
    assert "hint: allow more" in completed.stderr
