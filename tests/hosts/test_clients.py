"""Clients that people use, talking to the server: openai, llm, schemathesis, SillyTavern."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from environments import needs_python_of, python_of
from processes import ServerProcess, run_process, start_process
from server_process import DATA, ONE, OTHER, serving
from waiting import eventually

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

pytestmark = pytest.mark.timeout(900)  # seconds: the fuzzer alone may take eight minutes

ROOT = Path(__file__).parents[2]
KEY = "sk-for-the-tests"
SILLYTAVERN = Path(
    os.environ.get("GPTQ_HOST_SILLYTAVERN")
    or ROOT / ".venvs" / "sillytavern" / "node_modules" / "sillytavern"
)
needs_sillytavern = pytest.mark.skipif(
    not (SILLYTAVERN / "server.js").is_file() or shutil.which("node") is None,
    reason="no SillyTavern: npm install --prefix .venvs/sillytavern sillytavern",
)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving("--api-key", KEY) as started:
        yield started


@pytest.fixture(scope="module")
def model() -> Iterator[gptq.LoadedModel]:
    """The same model, by itself."""
    with gptq.load(DATA / ONE, device="cpu") as loaded:
        yield loaded


def greedy(count: int) -> gptq.GenerateOptions:
    return gptq.GenerateOptions(max_new_tokens=count, temperature=0)


def chatted(model: gptq.LoadedModel, count: int) -> str:
    messages = [{"role": "user", "content": "Hello"}]
    return "".join(it.text for it in model.chat(messages, greedy(count)))


def in_clients(*args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the Python of the clients' environment."""
    return run_process(
        [str(python_of("clients")), *args],
        env={**os.environ, "PYTHONPATH": "", **environ},
        seconds=500,
    )


@pytest.mark.host("openai")
@needs_python_of("clients")
def test_the_openai_client(server: ServerProcess, model: gptq.LoadedModel) -> None:
    program = str(Path(__file__).with_name("openai_program.py"))
    process = in_clients(program, server.url, KEY, ONE, OTHER)
    assert process.returncode == 0, process.stderr
    answers: dict[str, Any] = json.loads(process.stdout)
    text = chatted(model, 16)
    assert {ONE, OTHER} <= set(answers["models"])
    assert answers["model"] == ONE
    assert (answers["text"], answers["finish"], answers["scored"]) == (text, "length", 16)
    assert answers["request"].startswith("req-")
    assert (answers["stream"]["text"], answers["stream"]["scored"]) == (text, 16)
    assert answers["stream"]["usage"]["completion_tokens"] == 16
    assert answers["helper"]["final"] == answers["helper"]["whole"]
    assert json.loads(answers["helper"]["final"])["size"] in (1, 2, 3)
    assert answers["async"]["chats"] == [text] * 8
    completed = model.generate("Hello", greedy(16)).text
    assert answers["async"]["completion"] == completed
    assert answers["completions"][0] == f"Hello{completed}"
    assert answers["offsets"][0] == 0
    assert answers["tools"] != text, "a template without tools has them in the system message"
    assert answers["other"] == OTHER
    assert answers["errors"] == {
        "model": ["NotFoundError", 404, "model_not_found", True],
        "type": ["BadRequestError", 400, None, True],
        "option": ["BadRequestError", 400, "unknown_option", True],
        "long": ["BadRequestError", 400, "context_length_exceeded", True],
        "forced": ["BadRequestError", 400, None, True],
    }
    assert answers["wrong key"] == "invalid_api_key"
    assert answers["embeddings"] == 501
    requests = [it for it in server.requests() if it["route"] == "/v1/embeddings"]
    assert len(requests) == 1, "the client was told not to try again"


@pytest.mark.host("llm")
@needs_python_of("clients")
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_llm_through_its_own_openai_models(
    server: ServerProcess, model: gptq.LoadedModel, tmp_path: Path, kind: str, stream: bool
) -> None:
    completion = "  completion: true\n" if kind == "completion" else ""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ours\n  model_name: {ONE}\n  api_base: {server.url}/v1\n"
        f"  api_key_name: gptq\n{completion}"
    )
    args = ["-m", "ours", "Hello", "--key", KEY, "-o", "temperature", "0", "-o", "max_tokens", "16"]
    completed = in_clients(
        "-m", "llm", *args, *([] if stream else ["--no-stream"]), LLM_USER_PATH=str(tmp_path)
    )
    assert completed.returncode == 0, completed.stderr
    right = chatted(model, 16) if kind == "chat" else model.generate("Hello", greedy(16)).text
    assert completed.stdout == f"{right}\n"


@pytest.mark.host("schemathesis")
@needs_python_of("clients")
def test_no_request_of_a_fuzzer_ends_in_a_fault(tmp_path: Path) -> None:
    with serving("--max-new-tokens", "16") as server:
        python = python_of("clients")
        assert python is not None
        completed = run_process(
            [
                str(python.with_name("schemathesis")),
                "run",
                f"{server.url}/openapi.json",
                "--checks=not_a_server_error,status_code_conformance,content_type_conformance,"
                "response_schema_conformance,negative_data_rejection",
                "--exclude-path-regex=embed",  # refuses everything, which counts as a fault
                "--max-examples=30",
                "--seed=1",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": ""},
            seconds=500,
        )
        assert completed.returncode == 0, completed.stdout[-4000:]
        statuses = {it["status"] for it in server.requests()}
        assert len(server.requests()) > 500
        assert 500 not in statuses
        assert "Traceback" not in "".join(server.lines)
        assert httpx.get(f"{server.url}/health", timeout=60).json()["running"] == 0


@pytest.fixture(scope="module")
def tavern(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """SillyTavern itself; the first start takes half a minute."""
    folder = tmp_path_factory.mktemp("tavern")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "node",
        "server.js",
        f"--configPath={folder / 'config.yaml'}",
        f"--dataRoot={folder / 'data'}",
        f"--port={port}",
        "--browserLaunchEnabled=false",
        "--disableCsrf",
    ]
    with (
        (folder / "log").open("w") as log,
        start_process(command, cwd=SILLYTAVERN, stdout=log, stderr=log) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):

        def answers() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                client.get("/")
            except httpx.TransportError:
                return False
            return True

        eventually(answers, seconds=120, awaited="SillyTavern", log=(folder / "log").read_text)
        yield client
        process.terminate()
        process.wait(timeout=60)


@pytest.fixture(scope="module")
def open_server() -> Iterator[ServerProcess]:
    """A server without a key: SillyTavern keeps keys in a store of its own."""
    with serving() as started:
        yield started


# What SillyTavern's text-completion page sends with its own defaults.
TEXT = {
    "prompt": "Hello",
    "max_new_tokens": 16,
    "max_tokens": 16,
    "temperature": 0,
    "top_p": 0.5,
    "typical_p": 1,
    "typical": 1,
    "min_p": 0,
    "repetition_penalty": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "top_k": 40,
    "skew": 0,
    "min_tokens": 0,
    "add_bos_token": True,
    "smoothing_factor": 0,
    "smoothing_curve": 1,
    "dry_allowed_length": 2,
    "dry_multiplier": 0,
    "dry_base": 1.75,
    "dry_sequence_breakers": '["\\n", ":"]',
    "dry_penalty_last_n": 0,
    "max_tokens_second": 0,
    "stopping_strings": ["\nUser:"],
    "stop": ["\nUser:"],
    "truncation_length": 400,
    "ban_eos_token": False,
    "skip_special_tokens": True,
    "include_reasoning": True,
    "top_a": 0,
    "tfs": 1,
    "mirostat_mode": 0,
    "mirostat_tau": 5,
    "mirostat_eta": 0.1,
    "custom_token_bans": "",
    "banned_strings": [],
    "xtc_threshold": 0.1,
    "xtc_probability": 0,
    "nsigma": 0,
    "top_n_sigma": 0,
    "min_keep": 0,
    "adaptive_target": -0.01,
    "adaptive_decay": 0.9,
    "rep_pen": 1,
    "rep_pen_range": 0,
    "repetition_penalty_range": 0,
    "guidance_scale": 1,
    "negative_prompt": "",
    "repeat_penalty": 1,
    "repeat_last_n": 0,
    "n_predict": 16,
    "num_predict": 16,
    "num_ctx": 400,
    "mirostat": 0,
    "ignore_eos": False,
    "rep_pen_slope": 1,
}
OF_OOBA = {
    "min_length": 0,
    "num_beams": 1,
    "length_penalty": 1,
    "early_stopping": False,
    "sampler_priority": ["temperature", "top_k"],
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "penalty_alpha": 0,
    "temperature_last": True,
    "do_sample": True,
}
OF_KOBOLDCPP = {"sampler_order": [6, 0, 1, 3, 4, 2, 5], "trim_stop": True}


@pytest.mark.host("sillytavern")
@needs_sillytavern
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("kind", "more"), [("ooba", OF_OOBA), ("koboldcpp", OF_KOBOLDCPP)])
def test_sillytaverns_text_completions(
    tavern: httpx.Client,
    open_server: ServerProcess,
    model: gptq.LoadedModel,
    kind: str,
    more: dict[str, Any],
    stream: bool,
) -> None:
    where = {"api_server": open_server.url, "api_type": kind}
    status = tavern.post("/api/backends/text-completions/status", json=where)
    assert status.json()["result"] == ONE
    body = {**TEXT, **more, **where, "model": ONE, "stream": stream}
    answer = tavern.post("/api/backends/text-completions/generate", json=body)
    assert answer.status_code == 200, answer.text
    right = model.generate("Hello", greedy(16)).text
    if not stream:
        assert answer.json()["choices"][0]["text"] == right
        return
    lines = [it.removeprefix("data: ") for it in answer.text.splitlines() if it.startswith("data")]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(it)["choices"][0]["text"] for it in lines[:-1]) == right


@pytest.mark.host("sillytavern")
@needs_sillytavern
@pytest.mark.parametrize("stream", [True, False])
def test_sillytaverns_kobold_page(
    tavern: httpx.Client, open_server: ServerProcess, model: gptq.LoadedModel, stream: bool
) -> None:
    where = {"api_server": f"{open_server.url}/api"}
    status = tavern.post("/api/backends/kobold/status", json=where).json()
    assert status == {"koboldUnitedVersion": "1.2.5", "koboldCppVersion": "KoboldCpp", "model": ONE}
    body = {
        **where,
        "prompt": "Hello",
        "gui_settings": False,
        "max_context_length": 400,
        "max_length": 16,
        "rep_pen": 1,
        "rep_pen_range": 256,
        "rep_pen_slope": 0,
        "temperature": 0,
        "tfs": 1,
        "top_a": 0,
        "top_k": 0,
        "top_p": 1,
        "min_p": 0,
        "typical": 1,
        "sampler_order": [6, 0, 1, 3, 4, 2, 5],
        "sampler_seed": -1,
        "mirostat": 0,
        "stop_sequence": ["\nUser:"],
        "streaming": stream,
        "can_abort": True,
    }
    answer = tavern.post("/api/backends/kobold/generate", json=body)
    right = model.generate("Hello", greedy(16)).text
    if not stream:
        assert answer.json()["results"][0]["text"] == right
        return
    lines = [it.removeprefix("data: ") for it in answer.text.splitlines() if it.startswith("data")]
    assert "".join(json.loads(it)["token"] for it in lines) == right


@pytest.mark.host("sillytavern")
@needs_sillytavern
@pytest.mark.parametrize("stream", [True, False])
def test_sillytaverns_chat(
    tavern: httpx.Client, open_server: ServerProcess, model: gptq.LoadedModel, stream: bool
) -> None:
    where = {"chat_completion_source": "custom", "custom_url": f"{open_server.url}/v1"}
    status = tavern.post("/api/backends/chat-completions/status", json=where).json()
    assert ONE in [it["id"] for it in status["data"]]
    body = {
        **where,
        "model": ONE,
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
        "max_tokens": 16,
        "stream": stream,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "top_p": 1,
    }
    answer = tavern.post("/api/backends/chat-completions/generate", json=body)
    right = chatted(model, 16)
    if not stream:
        assert answer.json()["choices"][0]["message"]["content"] == right
        return
    lines = [it.removeprefix("data: ") for it in answer.text.splitlines() if it.startswith("data")]
    assert lines[-1] == "[DONE]"
    deltas = [json.loads(it)["choices"][0]["delta"] for it in lines[:-1]]
    assert "".join(it.get("content", "") for it in deltas) == right


@pytest.mark.host("openai")
@needs_python_of("clients")
def test_the_python_of_the_docs_runs(open_server: ServerProcess) -> None:
    text = (ROOT / "docs" / "hosts" / "server.md").read_text(encoding="utf-8")
    found = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found
    for code in found:
        here = code.replace("http://127.0.0.1:8000", open_server.url).replace('"demo"', repr(ONE))
        completed = in_clients("-c", here)
        assert completed.returncode == 0, completed.stderr
        assert completed.stdout
