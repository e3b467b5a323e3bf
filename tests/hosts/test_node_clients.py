"""Clients of npm, each by its own quick start: chats, streams, tools, structured output, errors.

They are installed by hand: npm install --prefix .venvs/node, and the names in CLIENTS.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from environments import ROOT
from processes import run_process
from server_process import CITIES, MODEL, THINKER, serving_clients

if TYPE_CHECKING:
    from collections.abc import Iterator

    from processes import ServerProcess

FOLDER = ROOT / ".venvs" / "node"
CLIENTS = (
    "@ai-sdk/anthropic",
    "@ai-sdk/openai",
    "@ai-sdk/openai-compatible",
    "@anthropic-ai/sdk",
    "ai",
    "ollama",
    "openai",
    "zod",
)
PROGRAM = Path(__file__).with_name("node_program.mjs")
NODE = shutil.which("node")

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.host("node"),
    pytest.mark.skipif(
        NODE is None or not all((FOLDER / "node_modules" / name).is_dir() for name in CLIENTS),
        reason=f"npm install --prefix .venvs/node {' '.join(CLIENTS)}",
    ),
]
pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server of two models, one of which thinks."""
    with serving_clients(tmp_path_factory.mktemp("models")) as started:
        yield started


@pytest.fixture
def run(server: ServerProcess, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the program of the test's client prints; the test is named after it."""
    name = request.node.name.removeprefix("test_")
    command = [str(NODE), PROGRAM, FOLDER, name, server.url, MODEL, THINKER]
    done = run_process(command, env={**os.environ}, seconds=600)
    assert done.returncode == 0, done.stderr[-4000:]
    printed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return printed


def check_ai_sdk(run: dict[str, Any], *, thinks: bool) -> None:
    """Check what the AI SDK's functions gave, by any of its providers."""
    assert run["text"]
    assert run["streamed"]
    assert (run["usage"], run["finish"]) == (8, "length")
    assert {run[it] for it in ("object", "parts", "chosen", "output")} <= set(CITIES)
    assert run["recorded"] in (*CITIES, "cut off"), "a record's names are free"
    assert {run["required"], run["named"]} <= set(CITIES)
    assert run["ran"] >= 1
    assert run["steps"] == 2, "the tool's answer goes back"
    assert run["turns"] >= 5, "each turn goes on from what the server kept, or is sent again"
    assert {"tool-input-start", "tool-input-delta", "tool-call", "finish"} <= set(run["kinds"])
    assert run["thought"] is (True if thinks else None)


def test_openai(run: dict[str, Any]) -> None:
    assert run["text"]
    assert run["streamed"]
    assert run["usage"] == 8
    named = ("parsed", "called", "streamed call", "form", "called in a response")
    assert {run[it] for it in named} <= set(CITIES)
    assert run["ran"]
    assert run["longer"], "the second response goes on from the first"
    assert run["inputs"] == 3, "in pages of two"
    assert run["first and last"] == ["response.created", "response.completed"]
    assert run["thought"]
    assert run["completion"]
    assert run["missing"] == "model_not_found"
    assert run["models"]


def test_ai_openai(run: dict[str, Any]) -> None:
    check_ai_sdk(run["responses"], thinks=False)
    check_ai_sdk(run["chat"], thinks=False)
    assert run["completion"]
    assert run["hints"]


def test_ai_compatible(run: dict[str, Any]) -> None:
    check_ai_sdk(run["strict"], thinks=True)
    assert run["text"]
    assert run["completion"]


def test_ai_anthropic(run: dict[str, Any]) -> None:
    check_ai_sdk(run, thinks=True)


def test_anthropic(run: dict[str, Any]) -> None:
    assert run["text"]
    assert run["stop"] == "max_tokens"
    assert run["streamed"]
    assert {run["called"], run["formed"]} <= set(CITIES)
    assert run["answered"] in ("text", "tool_use")
    assert run["kinds"][0] == "message_start"
    assert run["kinds"][-1] == "message_stop"
    assert run["counted"]
    assert run["thought"] == "thinking"
    assert run["missing"] == "not_found_error"
    assert run["beta"] == "text"
    assert run["models"]
    assert run["ran"], "by the SDK's own tool runner"
    assert run["second turn"] == "assistant"


def test_ollama(run: dict[str, Any]) -> None:
    assert run["text"]
    assert run["streamed"], "in parts it is the same"
    assert run["city"] in CITIES
    assert (run["called"], run["history"]) == ("string", "assistant")
    assert run["thought"]
    assert run["completion"]
    assert run["models"]
    assert run["running"] == 1
    assert run["version"]
    assert "tools" in run["capabilities"]
    assert run["missing"] == "ResponseError"
