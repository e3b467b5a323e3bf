"""Start the real text-generation-webui, and call its API and its page's queue."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from environments import python_of
from processes import run_process
from waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["WEBUI", "Page", "Webui", "in_webui"]

WEBUI = Path(os.environ.get("WEBUI_DIR") or "no-webui-dir")
START_SECONDS, ANSWER_SECONDS, SETTLE_SECONDS = 180, 120, 4


def environ(**more: str) -> dict[str, str]:
    """Make an environment in which nothing is fetched, or written into the host's folder."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "WEBUI_DIR")}
    if os.environ.get("GPTQ_HOST_PYTHON_WEBUI"):  # an environment that may lack this package
        kept["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    fixed = {
        "COLUMNS": "200",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return kept | fixed | more


def in_webui(code: str, *arguments: str, **more: str) -> str:
    """Run code with the host's modules to import, as server.py would be run; give its output."""
    completed = run_process(
        [str(python_of("webui")), "-c", f"import sys; sys.path.insert(0, '.')\n{code}", *arguments],
        cwd=WEBUI,
        env=environ(**more),
        seconds=START_SECONDS,
    )
    assert completed.returncode == 0, completed.stdout + completed.stderr
    return completed.stdout


@dataclass
class Webui:
    """One running host; `with Webui(...) as host`.

    Args:
        folder: where its models, its user data and its log go.
        arguments: the host's own.
        ours: started by `gptq-loader webui run`; else by its own server.py.
    """

    folder: Path
    arguments: Sequence[str] = ()
    ours: bool = True
    more: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.port, self.page_port = _free_port(), _free_port()
        self.models = self.folder / "models"
        self.user_data = self.folder / "user_data"
        self.models.mkdir(parents=True, exist_ok=True)
        if not self.user_data.exists():
            shutil.copytree(WEBUI / "user_data", self.user_data)

    def __enter__(self) -> Self:
        python = str(python_of("webui"))
        start = [python, "-u", "server.py"]
        if self.ours:
            start = [python, "-u", "-m", "gptq_loader_plugin", "webui", "run", "--dir", str(WEBUI)]
            start.append("--")
        start += ["--api", "--api-port", str(self.port), "--listen-port", str(self.page_port)]
        start += ["--cpu", "--model-dir", str(self.models), "--user-data-dir", str(self.user_data)]
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*start, *self.arguments],
                cwd=WEBUI,
                env=environ(**self.more),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            eventually(
                self._answers, START_SECONDS, awaited="an answer of the host's API", log=self.log
            )
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)

    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        """Return all that it has written."""
        text = (self.folder / "log").read_text(errors="replace")
        return re.sub(r"[ \t]+\n", "\n", text)

    def add(self, checkpoint: Path, name: str | None = None) -> str:
        """Copy a checkpoint into its models folder; return its name there."""
        name = name or checkpoint.name
        if not (self.models / name).exists():
            shutil.copytree(checkpoint, self.models / name)
        return name

    def get(self, path: str) -> Any:
        return self._open(path, None)

    def post(self, path: str, **body: Any) -> Any:
        return self._open(path, body)

    def refused(self, path: str, **body: Any) -> str:
        """Post a request that must fail; return the API's reason."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.post(path, **body)
        assert caught.value.code == 500
        return str(json.load(caught.value)["detail"])

    def load(self, name: str, **args: Any) -> str:
        """Load by the API; return the loader that did."""
        assert self.post("/v1/internal/model/load", model_name=name, args=args) == "OK"
        info = self.get("/v1/internal/model/info")
        assert info["model_name"] == name
        return str(info["loader"])

    def unload(self) -> None:
        assert self.post("/v1/internal/model/unload") == "OK"

    def complete(self, prompt: str, tokens: int, **more: Any) -> tuple[str, dict[str, int]]:
        """Complete greedily; return the text and the usage."""
        answer = self.post(
            "/v1/completions", prompt=prompt, max_tokens=tokens, temperature=0, **more
        )
        return answer["choices"][0]["text"], answer["usage"]

    def prompt_of(self, *messages: dict[str, str]) -> str:
        """Render messages with the template in force."""
        answer = self.post("/v1/internal/chat-prompt", messages=list(messages), max_tokens=8)
        return str(answer["prompt"])

    def stream(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        """Stream a reply's events; closing the iterator closes the connection."""
        with self._request(path, body | {"stream": True}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer:
                if line.startswith(b"data: "):
                    data = line[6:].strip()
                    yield {} if data == b"[DONE]" else json.loads(data)

    def generated(self) -> list[int]:
        """Return the number of tokens of every reply so far, as the host has logged it."""
        return [int(count) for count in re.findall(r"tokens/s,\s+(\d+)\s+tokens,", self.log())]

    def resident(self) -> int:
        """Return the memory the host has, in bytes."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0])

    def _answers(self) -> bool:
        assert self.running(), self.log()
        try:
            self.get("/v1/models")
        except OSError:
            return False
        return True

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        with self._request(path, body) as answer:
            return json.load(answer)

    def _request(self, path: str, body: dict[str, Any] | None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=ANSWER_SECONDS)


class Page:
    """The host's page, driven over Gradio's queue as its own JavaScript does, without a browser."""

    def __init__(self, host: Webui) -> None:
        self.url = f"http://127.0.0.1:{host.page_port}"
        self.session = uuid.uuid4().hex[:10]

        def runs() -> bool:
            assert host.running(), host.log()
            return "Running on local URL" in host.log()

        eventually(runs, START_SECONDS, awaited="the host's page", log=host.log)
        # Gradio now asks for its own page, and gives up after 3 seconds: a request beside that one
        # makes it late on a busy machine.
        time.sleep(SETTLE_SECONDS)
        assert host.running(), host.log()
        config = json.loads(self._get("/config"))
        self.components = {component["id"]: component for component in config["components"]}
        self.events = config["dependencies"]
        self.layout = config["layout"]
        self.values = {
            key: None if component["type"] == "state" else component["props"].get("value")
            for key, component in self.components.items()
        }

    def find(self, label: str, kind: str = "dropdown") -> int:
        """Find a control by its label, or a button by its text; the first of several."""
        return next(
            key
            for key, component in self.components.items()
            if component["type"] == kind
            and label in [component["props"].get(it) for it in ("label", "elem_id", "value")]
        )

    def choices(self, label: str) -> list[str]:
        return [it[0] for it in self.components[self.find(label)]["props"]["choices"]]

    def set(self, label: str, value: Any, kind: str = "dropdown") -> None:
        """Set a control, and run the events of its change."""
        control = self.find(label, kind)
        self.values[control] = value
        self._run(control, "change")

    def press(self, button: int) -> None:
        self._run(button, "click")

    def button_after(self, control: str, text: str) -> int:
        """Find the first button of this text that stands after a control."""
        start = self.find(control)
        return min(
            key
            for key, component in self.components.items()
            if key > start
            and component["type"] == "button"
            and component["props"].get("value") == text
        )

    def value(self, label: str, kind: str = "dropdown") -> Any:
        return self.values[self.find(label, kind)]

    def all_values(self) -> str:
        """Return every text on the page."""
        return "\n".join(value for value in self.values.values() if isinstance(value, str))

    def _run(self, target: int, event: str) -> None:
        """Run the handlers of an event, those that follow each, and those of what changed."""
        before = dict(self.values)
        for first, handler in enumerate(self.events):
            if [target, event] in [list(pair) for pair in handler["targets"]]:
                self._run_chain(first)
        changed = [key for key, value in self.values.items() if value != before.get(key)]
        for key in changed:
            if key != target:
                self._run(key, "change")

    def _run_chain(self, first: int) -> None:
        following = [first]
        while following:
            index = following.pop(0)
            if self._call(index):
                following += [
                    i for i, other in enumerate(self.events) if other["trigger_after"] == index
                ]

    def _call(self, index: int) -> bool:
        event = self.events[index]
        if not event["backend_fn"]:
            return True
        body = {
            "data": [self.values.get(key) for key in event["inputs"]],
            "fn_index": index,
            "session_hash": self.session,
            "event_data": None,
        }
        self._get("/queue/join", json.dumps(body).encode())
        with self._open(f"/queue/data?session_hash={self.session}") as stream:
            for line in stream:
                if not line.startswith(b"data:"):
                    continue
                message = json.loads(line[5:])
                if message["msg"] in ("process_generating", "process_completed"):
                    self._update(event["outputs"], message.get("output", {}).get("data") or [])
                if message["msg"] == "process_completed":
                    return bool(message["success"])
                if message["msg"] == "close_stream":
                    return False
        return False

    def _update(self, outputs: list[int], data: list[Any]) -> None:
        for key, value in zip(outputs, data, strict=False):
            if isinstance(value, dict) and value.get("__type__") == "update":
                self.components[key]["props"].update(value)
                if "value" in value:
                    self.values[key] = value["value"]
            elif not isinstance(value, list) or not value or not isinstance(value[0], list):
                self.values[key] = value

    def _get(self, path: str, body: bytes | None = None) -> bytes:
        with self._open(path, body) as answer:
            content: bytes = answer.read()
        return content

    def _open(self, path: str, body: bytes | None = None) -> Any:
        request = urllib.request.Request(
            self.url + path, data=body, headers={"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=ANSWER_SECONDS)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
    return port
