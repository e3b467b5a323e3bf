"""A real server on loopback, in a thread, with the tests' checkpoints in its models folder."""

from __future__ import annotations

import json
import logging
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from altered import DATA, ONE, plugins
from waiting import join

import gptq_loader_plugin as gptq
from gptq_loader_extensions.openai.app import create_app
from gptq_loader_extensions.openai.http.request_log import LOGGER
from gptq_loader_extensions.openai.replies.batching import BatchEngine
from gptq_loader_extensions.openai.replies.model_registry import ModelRegistry
from gptq_loader_extensions.openai.server import Server
from gptq_loader_extensions.openai.serving import bind
from gptq_loader_extensions.openai.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from gptq_loader_plugin.generation.generate import Generation, Piece

OTHER = "gptq-3bit-128g-act-sym"
CHAT = "/v1/chat/completions"
COMPLETE = "/v1/completions"


def load(target: str | Path) -> gptq.LoadedModel:
    return gptq.load(target, device="cpu", dtype="float32", plugins=plugins())  # to the bit


class Brake:
    """A load whose models wait for leave after each piece of text.

    Args:
        loads: loads them.
    """

    def __init__(self, loads: Callable[[str | Path], gptq.LoadedModel] = load) -> None:
        self._loads = loads
        self.leave = threading.Semaphore(0)
        self.began = threading.Semaphore(0)
        self.cancelled = 0

    def __call__(self, target: str | Path) -> gptq.LoadedModel:
        model = self._loads(target)
        begin = model.begin

        def braked(*args: Any, **options: Any) -> Generation:
            generation = begin(*args, **options)
            self.began.release()
            sample, cancelled = generation.sample, generation.cancelled
            unsent = 0

            def counted(logits: torch.Tensor) -> Piece | None:
                nonlocal unsent
                piece = sample(logits)
                unsent += piece is not None and piece.finish is None
                return piece

            def held() -> Piece | None:
                nonlocal unsent
                if unsent:
                    unsent -= 1
                    assert self.leave.acquire(timeout=60)
                piece = cancelled()
                self.cancelled += piece is not None
                return piece

            generation.sample, generation.cancelled = counted, held  # type: ignore[method-assign]
            return generation

        model.begin = braked  # type: ignore[method-assign]
        return model

    def wait_for_reply(self) -> None:
        """Wait until a reply has begun."""
        assert self.began.acquire(timeout=60)

    def let_go(self) -> None:
        """Let every reply run to its end."""
        self.leave.release(1_000_000)


@dataclass
class Running:
    """A server that runs.

    Attributes:
        client: asks it.
        server: what its routes share.
        lines: what it logged of requests.
    """

    client: httpx.Client
    server: Server
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return str(self.client.base_url)

    def post(self, route: str, **body: Any) -> httpx.Response:
        return self.client.post(route, json=body)

    def chat(self, text: str = "Hello", **body: Any) -> httpx.Response:
        return self.post(CHAT, **{"messages": [{"role": "user", "content": text}], **body})

    def events(self, route: str, **body: Any) -> list[Any]:
        """Give the events of a stream; "[DONE]" stays as it is."""
        with self.client.stream("POST", route, json={**body, "stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines = [it for it in answer.iter_lines() if it.startswith("data: ")]
        return [
            it[6:] if it == "data: [DONE]" else json.loads(it.removeprefix("data: "))
            for it in lines
        ]


@contextmanager
def running(
    folder: Path,
    *,
    names: tuple[str, ...] = (ONE, OTHER),
    start: str | None = ONE,
    loads: Callable[[str | Path], gptq.LoadedModel] = load,
    headers: dict[str, str] | None = None,
    max_num_seqs: int = 1,
    **settings: Any,
) -> Iterator[Running]:
    """Serve the checkpoints of `names`, put into a models folder."""
    import shutil

    models = folder / "models"
    for name in names:
        if not (models / name).exists():
            shutil.copytree(DATA / name, models / name)
    chosen = Settings(port=0, models_dir=models, max_num_seqs=max_num_seqs, **settings)
    registry = ModelRegistry(chosen, load=loads)
    registry.load_initial(start, None)
    engine = BatchEngine(registry, max_queue=chosen.max_queue, max_num_seqs=chosen.max_num_seqs)
    server = Server(chosen, registry, engine)
    listening = bind(chosen.host, 0)
    host = uvicorn.Server(
        uvicorn.Config(create_app(server), log_config=None, access_log=False, lifespan="off")
    )
    thread = threading.Thread(target=host.run, kwargs={"sockets": [listening]})
    lines: list[dict[str, Any]] = []
    handler = _Lines(lines)
    log = logging.getLogger(LOGGER)
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    thread.start()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx.Client(base_url=address, headers=headers, timeout=60) as client:
            yield Running(client, server, lines)
    finally:
        if isinstance(loads, Brake):
            loads.let_go()
        host.should_exit = True
        join(thread)
        engine.close()
        listening.close()
        log.removeHandler(handler)


class _Lines(logging.Handler):
    def __init__(self, lines: list[dict[str, Any]]) -> None:
        super().__init__()
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(json.loads(record.getMessage()))
