"""The page and the chat as parts of somebody else's application, over real connections."""

from __future__ import annotations

import gc
import re
import socket
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from waiting import eventually, join

import gptq_loader_plugin as gptq
from gptq_loader_extensions.gradio.serving import mount, parts_for

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "data" / "checkpoints" / "gptq-4bit-32g-act-sym"
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # event loops of gradio's
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # gradio 6.31 with pandas 3
]


@pytest.fixture(scope="module", autouse=True)
def _gradio() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        pytest.importorskip("gradio")
        yield
        gc.collect()


@pytest.fixture(scope="module")
def model() -> Iterator[gptq.LoadedModel]:
    with gptq.load(CHECKPOINT, device="cpu") as loaded:
        yield loaded


def documented(number: int) -> dict[str, Any]:
    """Run a block of code of docs/page.md; give its names."""
    text = (ROOT / "docs" / "page.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[number]
    names: dict[str, Any] = {}
    exec(code.replace('"demo"', repr(str(CHECKPOINT))), names)
    return names


def reply(model: gptq.LoadedModel, *messages: dict[str, str]) -> str:
    options = gptq.GenerateOptions(max_new_tokens=6, temperature=0)
    return "".join(piece.text for piece in model.chat(messages, options))


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve an application as anyone's own would be."""
    import uvicorn

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        running = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        running.start()
        try:
            eventually(lambda: server.started, awaited="the server to start")
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            join(running)


def test_gr_load_embeds_a_chat_that_programs_can_call(model: gptq.LoadedModel) -> None:
    from gradio_client import Client

    page = documented(0)["page"]
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        client = Client(url, verbose=False)
        try:
            hello = {"role": "user", "content": "Hello"}
            first = client.predict("Hello", "", 6, 0, api_name="/chat")
            assert first == reply(model, hello)
            second = client.predict("Hello", "Be brief.", 6, 0, api_name="/chat")
            talk = [hello, {"role": "assistant", "content": first}, hello]
            system = {"role": "system", "content": "Be brief."}
            assert second == reply(model, system, *talk), "the turns before go along"
            long = client.submit("Hello", "", 300, 0, api_name="/chat")
            assert long.result()
            assert len(long.outputs()) > 1, "it streams"
            with pytest.raises(Exception, match="The option max_new_tokens"):
                client.predict("Hello", "", 0, 0, api_name="/chat")
        finally:
            client.close()
    finally:
        page.close(verbose=False)


def test_the_documented_way_to_mount_the_page_works() -> None:
    import httpx

    with served(documented(1)["app"]) as url:
        page = httpx.get(url, timeout=60)
    assert page.status_code == 200
    assert "No model is loaded" in page.text


def test_the_page_is_mounted_behind_the_routes_of_an_application(
    model: gptq.LoadedModel, tmp_path: Path
) -> None:
    import httpx
    from fastapi import FastAPI

    app = FastAPI()
    app.add_api_route("/v1/models", lambda: {"data": []})
    mount(app, parts_for(model, models_dir=tmp_path))
    with served(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/v1/models").json() == {"data": []}
        page = client.get("/")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "gptqPage" in page.text
        assert "content-security-policy" not in client.get("/v1/models").headers
        names = client.get("/gradio_api/info").json()["named_endpoints"]
        assert names == {}, "the page's events are no interface"
        for path in ("file=/etc/passwd", f"file={CHECKPOINT}/config.json", "file=../../etc/passwd"):
            assert client.get(f"/gradio_api/{path}").status_code in (403, 404)
        sent = client.post("/gradio_api/upload", files={"files": ("a.txt", b"xx" * 100)})
        assert sent.status_code == 413


def test_a_mounted_page_can_ask_who_comes(model: gptq.LoadedModel, tmp_path: Path) -> None:
    import httpx
    from fastapi import FastAPI

    app = FastAPI()
    parts = parts_for(model, models_dir=tmp_path)
    mount(app, parts, path="/page", allowed=lambda _, password: password == "key")
    with (
        served(app) as url,
        httpx.Client(base_url=url, follow_redirects=True, timeout=60) as client,
    ):
        assert client.get("/page/config").status_code == 401
        login = {"username": "anyone", "password": "wrong"}
        assert client.post("/page/login", data=login).status_code == 400
        assert client.post("/page/login", data={**login, "password": "key"}).status_code == 200
        assert client.get("/page/config").status_code == 200
