"""gptq-loader serve, as a person runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from altered import DATA, ONE

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    "host-openai" not in {it.name for it in entry_points(group="gptq_loader_plugin")},
    reason="this package was installed before it had a server; install it again",
)


@contextmanager
def serving(*args: str, **environ: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """Start the command; give the process, and what it says on stdout."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gptq_loader_plugin", "serve", "--port", "0", "--json", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_it_serves_says_how_and_ends_well_on_ctrl_c() -> None:
    key = "sk-from-the-environment"
    with serving(str(DATA / ONE), "--grace", "1", GPTQ_LOADER_API_KEY=key) as (process, told):
        assert told["model"] == ONE
        assert sum(told["kernels"].values()) == 14
        assert httpx.get(told["url"] + "/health").status_code == 401
        headers = {"authorization": f"Bearer {key}"}
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {"prompt": "Hello", "max_tokens": 400, "temperature": 0, "stream": True}
            url = told["url"] + "/v1/completions"
            with httpx.stream("POST", url, json=body, headers=headers) as answer:
                began.set()
                answer.read()
                answers.append(answer)

        began = threading.Event()
        thread = threading.Thread(target=ask)
        thread.start()
        assert began.wait(60)
        process.send_signal(signal.SIGINT)
        _, words = process.communicate(timeout=60)
        thread.join()
    assert process.returncode == 130
    assert "Traceback" not in words
    assert answers[0].text.endswith("data: [DONE]\n\n"), "a reply under way may end"
    assert f"serving {ONE}: " in words
    assert f"the API is at {told['url']}/v1" in words
    assert key not in words
    assert words.rstrip().endswith("stopped")


def test_a_reply_that_does_not_end_is_cut() -> None:
    with serving(str(DATA / ONE), "--grace", "0") as (process, told):
        url = told["url"] + "/v1/completions"
        asked = {"prompt": ["Hello"] * 64, "max_tokens": 500, "temperature": 0, "stream": True}
        with httpx.stream("POST", url, json=asked, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            *_, last, done = (it for it in lines if it)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        assert done == "data: [DONE]"
        _, words = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in words


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("demo", "--listen"), "everyone who can reach 0.0.0.0 could use this server"),
        (("--port", "99999"), "99999 is no port"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_is_loaded(
    args: tuple[str, ...], words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "gptq_loader_plugin", "serve", *args],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert f"error: {words}" in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--engine", "nobody"], "there is no engine 'nobody'"),
        (["--replicas", "2"], "--replicas is for another engine"),
        (["--tensor-parallel", "2"], "--tensor-parallel is for another engine"),
    ],
)
def test_it_says_which_engine_takes_an_option(arguments: list[str], words: str) -> None:
    asked = [sys.executable, "-m", "gptq_loader_plugin", "serve", str(DATA / ONE), *arguments]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert f"error: {words}" in found.stderr
    assert "hint: " in found.stderr
