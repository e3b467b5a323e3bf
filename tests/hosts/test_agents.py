"""Client libraries of agents, each by its own quick start, with the APIs that each speaks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from environments import needs_python_of, python_of
from processes import run_process
from server_process import CITIES, MODEL, THINKER, serving_clients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import ServerProcess

pytestmark = [pytest.mark.timeout(900), needs_python_of("agents"), pytest.mark.host("agents")]
pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving_clients(tmp_path_factory.mktemp("models")) as started:
        yield started


@pytest.fixture
def run(server: ServerProcess, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the program of the test's client prints; the test is named after it."""
    name = request.node.name.removeprefix("test_")
    program = str(Path(__file__).with_name("agents_program.py"))
    environment = "llama-index" if name == "llama_index" else "agents"
    python = python_of(environment)
    if python is None:
        pytest.skip(f"no environment {environment}; make hosts sets it up")
    done = run_process(
        [str(python), program, name, server.url, MODEL, THINKER],
        env={**os.environ, "PYTHONPATH": ""},
        seconds=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def test_openai(run: dict[str, Any]) -> None:
    assert run["text"]
    assert run["longer"], "the second response goes on from the first"
    assert run["city"] in CITIES
    assert run["first and last"] == ["response.created", "response.completed"]
    assert run["streamed"] in CITIES
    assert run["thought"]
    assert run["ignored"] == "reasoning_effort, verbosity"


def test_anthropic(run: dict[str, Any]) -> None:
    assert run["text"]
    assert run["stop"] == "max_tokens"
    assert run["city"] in CITIES
    assert run["streamed"] in CITIES
    assert run["counted"]
    assert run["errors"] == ["NotFoundError", "BadRequestError"]
    assert run["models"]


def test_ollama(run: dict[str, Any]) -> None:
    assert run["text"]
    assert run["streamed"]
    assert run["completion"]
    assert run["city"] in CITIES
    assert run["thought"]
    assert run["models"]
    assert "tools" in run["capabilities"]
    assert run["running"] == [MODEL, 64, 9999]
    assert run["unloaded"] == ["unload", 0]
    assert run["pulled"] == "success"
    assert "makes no embeddings" in run["refused"]


def test_litellm(run: dict[str, Any]) -> None:
    assert run["city"] in CITIES
    assert all(run["texts"])
    assert run["thought"]
    assert run["output"] == 1


def test_langchain(run: dict[str, Any]) -> None:
    assert {run["city"], run["formed"]} <= set(CITIES)
    assert run["text"]


def test_llama_index(run: dict[str, Any]) -> None:
    assert all(run["texts"])
    assert {run["called"], run["formed"], run["by a schema"]} <= set(CITIES)
    assert run["answer"] in [f"sunny in {city}" for city in CITIES]


def test_instructor(run: dict[str, Any]) -> None:
    assert {run["city"], run["response"]} <= set(CITIES)


def test_pydantic_ai(run: dict[str, Any]) -> None:
    assert run["city"] in CITIES
    assert run["text"]


def test_openai_agents(run: dict[str, Any]) -> None:
    assert run["city"] in CITIES


def test_smolagents(run: dict[str, Any]) -> None:
    assert run["city"] in CITIES


def test_outlines(run: dict[str, Any]) -> None:
    assert run["city"] in CITIES
    assert run["choice"] in ("yes", "no")
