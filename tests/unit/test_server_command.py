"""gptq-loader serve, as a person runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from altered import DATA, ONE
from lora_files import write_adapter
from processes import ServerProcess, run_process, start_server
from waiting import join

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    "host-openai" not in {it.name for it in entry_points(group="gptq_loader_plugin")},
    reason="this package was installed before it had a server; install it again",
)


def serving(*args: str, **environ: str) -> AbstractContextManager[ServerProcess]:
    """Start the command."""
    command = [sys.executable, "-m", "gptq_loader_plugin", "serve", "--port", "0", "--json", *args]
    return start_server(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environ})


def test_it_serves_says_how_and_ends_well_on_ctrl_c() -> None:
    key = "sk-from-the-environment"
    with serving(str(DATA / ONE), "--grace", "1", GPTQ_LOADER_API_KEY=key) as server:
        assert server.ready["model"] == ONE
        assert sum(server.ready["kernels"].values()) == 14
        assert httpx.get(server.url + "/health", timeout=60).status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {"prompt": "Hello", "max_tokens": 400, "temperature": 0, "stream": True}
            url = server.url + "/v1/completions"
            with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
                began.set()
                answer.read()
                answers.append(answer)

        began = threading.Event()
        thread = threading.Thread(target=ask)
        thread.start()
        assert began.wait(60)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 130
        join(thread)
    assert "Traceback" not in server.log
    assert answers[0].text.endswith("data: [DONE]\n\n"), "a reply under way may end"
    assert f"serving {ONE}: " in server.log
    assert f"the API is at {server.url}/v1" in server.log
    assert key not in server.log
    assert server.log.rstrip().endswith("stopped")


def test_a_model_of_the_models_folder_has_its_adapters(tmp_path: Path) -> None:
    shutil.copytree(DATA / ONE, tmp_path / "models" / ONE)
    adapter = write_adapter(tmp_path / "pirate", DATA / ONE, seed=0)
    options = ("--models-dir", str(tmp_path / "models"), "--lora", f"pirate={adapter}")
    with serving(ONE, *options) as server:
        listed = httpx.get(server.url + "/v1/models", timeout=60).json()["data"]
        assert [it["id"] for it in listed] == [ONE, "pirate"]


def test_a_reply_that_does_not_end_is_cut() -> None:
    with serving(str(DATA / ONE), "--grace", "0") as server:
        url = server.url + "/v1/completions"
        request = {"prompt": ["Hello"] * 64, "max_tokens": 500, "temperature": 0, "stream": True}
        with httpx.stream("POST", url, json=request, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            *_, last, end = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        assert end == "data: [DONE]"
        assert server.process.wait(60) == 130
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("demo", "--listen"), "everyone who can reach 0.0.0.0 could use this server"),
        (("--port", "99999"), "99999 is not a port"),
        (("--lora", "pirate=./pirate"), "--lora is for the model that is served first"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    args: tuple[str, ...], words: str
) -> None:
    completed = run_process([sys.executable, "-m", "gptq_loader_plugin", "serve", *args])
    assert completed.returncode == 1
    assert f"error: {words}" in completed.stderr
    assert "hint: " in completed.stderr
    assert "Traceback" not in completed.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "nobody"], "there is no engine 'nobody'"),
        (["--replicas", "2"], "--replicas is for another engine"),
        (["--tensor-parallel", "2"], "--tensor-parallel is for another engine"),
    ],
)
def test_it_says_which_engine_takes_an_option(arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "gptq_loader_plugin", "serve", str(DATA / ONE), *arguments]
    completed = run_process(command)
    assert completed.returncode == 1
    assert f"error: {words}" in completed.stderr
    assert "hint: " in completed.stderr
