"""Open WebUI itself, with the server as its only connection."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from environments import needs_python_of, python_of
from processes import ServerProcess, start_process
from server_process import DATA, ONE, OTHER, serving
from waiting import eventually

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.host("open-webui"),
    pytest.mark.timeout(900),  # seconds: its first start takes minutes
    needs_python_of("open-webui"),
]

KEY = "sk-for-open-webui"
CHAT = "/api/chat/completions"
# What its page sends with every chat, for the tools it has itself.
TOOL = {
    "type": "function",
    "function": {
        "name": "get_current_timestamp",
        "description": "Get the current time.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}
# Nothing is fetched, and nothing but the chat is asked of the model.
SETTINGS = {
    "AUDIO_STT_ENGINE": "openai",
    "ENABLE_FOLLOW_UP_GENERATION": "false",
    "ENABLE_OLLAMA_API": "false",
    "ENABLE_TAGS_GENERATION": "false",
    "ENABLE_TITLE_GENERATION": "false",
    "ENABLE_VERSION_UPDATE_CHECK": "false",
    "HF_HUB_OFFLINE": "1",
    "OFFLINE_MODE": "true",
    "OPENAI_API_KEY": KEY,
    "PYTHONPATH": "",
    "RAG_EMBEDDING_ENGINE": "openai",
    "RAG_OPENAI_API_KEY": "none",
    "WEBUI_AUTH": "False",
    "WEBUI_SECRET_KEY": "for-the-tests",
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving("--api-key", KEY) as started:
        yield started


@pytest.fixture(scope="module")
def page(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Open WebUI, signed in; its first start takes a minute or more."""
    folder: Path = tmp_path_factory.mktemp("open-webui")
    python = python_of("open-webui")
    assert python is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {
        **os.environ,
        **SETTINGS,
        "DATA_DIR": str(folder),
        "OPENAI_API_BASE_URL": f"{server.url}/v1",
        "RAG_OPENAI_API_BASE_URL": f"{server.url}/v1",
    }
    command = [str(python.with_name("open-webui")), "serve", "--host", "127.0.0.1"]
    command += ["--port", str(port)]
    with (
        (folder / "log").open("w") as log,
        start_process(command, env=environ, cwd=folder, stdout=log, stderr=log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):

        def answers() -> bool:
            assert process.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                return client.get("/health").status_code == 200
            except httpx.TransportError:
                return False

        eventually(answers, seconds=500, awaited="Open WebUI", log=(folder / "log").read_text)
        signed = client.post("/api/v1/auths/signin", json={"email": "", "password": ""}).json()
        client.headers["authorization"] = f"Bearer {signed['token']}"
        yield client
        process.terminate()
        process.wait(timeout=60)


def text_alone() -> str:
    messages = [{"role": "user", "content": "Hello"}]
    options = gptq.GenerateOptions(max_new_tokens=16, temperature=0)
    with gptq.load(DATA / ONE, device="cpu") as model:
        return "".join(it.text for it in model.chat(messages, options))


def request_body(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello"}]
    return {"model": ONE, "messages": messages, "temperature": 0, "max_tokens": 16, **more}


def test_it_lists_our_models(page: httpx.Client) -> None:
    names = [it["id"] for it in page.get("/api/models").json()["data"]]
    assert {ONE, OTHER} <= set(names)


def test_a_reply_is_what_the_model_says_alone(page: httpx.Client, server: ServerProcess) -> None:
    right = text_alone()
    whole = page.post(CHAT, json=request_body(stream=False)).json()
    assert whole["choices"][0]["message"]["content"] == right
    answer = page.post(CHAT, json=request_body(stream=True, tools=[TOOL]))
    assert answer.status_code == 200, answer.text
    lines = [it.removeprefix("data: ") for it in answer.text.splitlines() if it.startswith("data")]
    events = [json.loads(it) for it in lines if it.startswith("{")]
    deltas = [choice["delta"] for it in events for choice in it.get("choices", [])]
    assert "".join(it.get("content") or "" for it in deltas) == right
    chats = [it for it in server.requests() if it["route"] == "/v1/chat/completions"]
    assert {it["status"] for it in chats} == {200}


def test_an_error_is_shown_in_our_words(page: httpx.Client) -> None:
    messages = [{"role": "user", "content": "word " * 600}]
    answer = page.post(CHAT, json=request_body(stream=False, messages=messages))
    assert answer.status_code == 400
    assert "maximum context length" in answer.text
