"""Who may come in, what may be named, and what is never written down."""

from __future__ import annotations

import json
import logging
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from altered import ONE
from served import CHAT, COMPLETE, OTHER, Running, running

from gptq_loader_extensions.openai import OpenAIHost, gptq_hosts
from gptq_loader_extensions.openai.settings import Settings
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.host import Host

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = "sk-of-this-server-alone"


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a key, and one origin that may call it."""
    folder = tmp_path_factory.mktemp("served")
    with running(
        folder,
        names=(ONE,),
        headers={"authorization": f"Bearer {KEY}"},
        api_key=KEY,
        cors=("http://friend.example",),
        max_body=100_000,
    ) as started:
        yield started


@pytest.fixture
def stranger(locked: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=locked.url, timeout=60) as client:
        yield client


def routes(served: Running) -> list[tuple[str, str]]:
    schema = served.client.get("/openapi.json").json()
    return [(method, path) for path, its in schema["paths"].items() for method in its]


def test_the_key_is_asked_for_everywhere(locked: Running, stranger: httpx.Client) -> None:
    found = [*routes(locked), ("get", "/"), ("get", "/openapi.json"), ("get", "/nothing")]
    assert ("get", "/metrics") in found
    assert ("get", "/health") in found
    for method, path in found:
        for given in (None, "Bearer wrong", "Basic abc", "Bearer", "Bearer " + KEY[:-1], KEY):
            headers = {} if given is None else {"authorization": given}
            answer = stranger.request(method, path, headers=headers, json={})
            assert answer.status_code == 401, (method, path, given)
            assert "the API key is missing or wrong" in answer.text
    assert stranger.get("/health", headers={"x-api-key": KEY}).status_code == 200
    assert stranger.get("/health", headers={"authorization": f"bearer {KEY}"}).status_code == 200


def test_a_browser_asks_a_person_for_the_key(locked: Running, stranger: httpx.Client) -> None:
    answer = stranger.get("/", headers={"accept": "text/html,*/*"})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert stranger.get("/", auth=("anyone", KEY)).status_code == 200
    assert stranger.get("/", auth=(KEY, "wrong")).status_code == 401
    broken = [(b"authorization", "Basic ä=".encode("latin-1"))]
    assert stranger.get("/", headers=broken).status_code == 401
    page = {"origin": "http://evil.example"}
    assert stranger.post(CHAT, auth=("a", KEY), headers=page, json={}).status_code == 403


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("", 403),
        ("127.0.0.1", 200),
        ("127.0.0.1:99", 200),
        ("[::1]:99", 200),
        ("localhost:5000", 200),
        ("192.168.1.5:5000", 200),
        ("LOCALHOST", 200),
        ("[::1]", 200),
        ("[2001:DB8::1]:80", 200),
        ("[::ffff:127.0.0.1]:80", 200),
        ("[::1].evil.example", 403),
        ("[::1]evil", 403),
        ("[::1]:80@evil.example", 403),
        ("[::1", 403),
        ("::1", 403),
        ("[localhost]", 403),
        ("[127.0.0.1]", 403),
        ("[::1%25evil.example]", 403),
        ("[::1%evil.example]:80", 403),
        ("localhost:80@evil.example", 403),
        ("user@localhost", 403),
        ("localhost:evil", 403),
        ("localhost:", 403),
        ("localhost:80:80", 403),
        ("localhost:-1", 403),
        ("localhost:65536", 403),
        ("localhost:" + "9" * 5000, 403),
        ("localhost/evil.example", 403),
        ("localhost#.evil.example", 403),
        ("127.1", 403),
        ("0x7f000001", 403),
        ("2130706433", 403),
    ],
)
def test_a_name_that_is_not_this_machines_is_refused(
    locked: Running, host: str, status: int
) -> None:
    assert locked.client.get("/health", headers={"host": host}).status_code == status


def test_two_hosts_are_none(locked: Running) -> None:
    two = [("host", "localhost"), ("host", "localhost"), ("authorization", f"Bearer {KEY}")]
    address = httpx.URL(locked.url)
    lines = "".join(f"{name}: {value}\r\n" for name, value in two)
    with socket.create_connection((address.host, address.port or 80), timeout=60) as connection:
        connection.sendall(f"GET /health HTTP/1.1\r\n{lines}\r\n".encode())
        assert b" 4" in connection.recv(100)[:12]


def test_other_origins_may_not_call_it(locked: Running) -> None:
    get = locked.client.get
    assert get("/health", headers={"origin": "http://evil.example"}).status_code == 403
    for origin in ("null", "", "http://[", locked.url.replace("http", "ftp").rstrip("/")):
        assert get("/health", headers={"origin": origin}).status_code == 403
    assert get("/health", headers={"origin": locked.url.rstrip("/")}).status_code == 200
    friend = get("/health", headers={"origin": "http://friend.example"})
    assert friend.status_code == 200
    assert friend.headers["access-control-allow-origin"] == "http://friend.example"
    request = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    for origin, status in (("http://friend.example", 200), ("http://evil.example", 400)):
        answer = httpx.options(locked.url + CHAT, headers={"origin": origin, **request})
        assert answer.status_code == status, "a browser asks without the key"


def test_a_body_has_a_limit(locked: Running) -> None:
    body = json.dumps({"prompt": "x" * 200_000}).encode()

    def parts() -> Iterator[bytes]:
        yield from (body[i : i + 10_000] for i in range(0, len(body), 10_000))

    for content in (body, parts()):
        answer = locked.client.post(
            COMPLETE, content=content, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_no_words_and_no_key_are_written_down(
    locked: Running, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "the-words-of-a-person"
    with caplog.at_level(logging.DEBUG):
        assert locked.chat(secret, max_tokens=3, user=secret).status_code == 200
        locked.chat(secret, temprature=1)
        locked.chat(secret * 500)
        locked.client.get(f"/v1/models/{secret}")
        locked.client.get("/health", params={"q": secret}, headers={"authorization": "Bearer x-y"})
    # pytest listens to uvicorn's list of requests too, which nobody else does
    others = ("http", "uvicorn.access")
    ours = [it for it in caplog.records if not it.name.startswith(others)]
    written = json.dumps(locked.lines) + "".join(it.getMessage() for it in ours)
    assert secret not in written
    assert KEY not in written
    assert "x-y" not in written
    line = next(it for it in locked.lines if it["route"] == CHAT and it["status"] == 200)
    assert line["tokens"] == 3
    assert line["model"] == ONE
    assert {"time", "request", "seconds", "queue_seconds", "first_token_seconds"} <= set(line)


def test_metrics_count_what_was_done(locked: Running) -> None:
    before = metrics(locked)
    assert locked.chat(max_tokens=7, temperature=0).status_code == 200
    assert locked.chat(n="x").status_code == 400
    after = metrics(locked)
    made = "gptq_generated_tokens_total"
    assert after[made] - before.get(made, 0) == 7
    refused = f'gptq_requests_total{{route="{CHAT}",status="400"}}'
    assert after[refused] - before.get(refused, 0) == 1
    assert after["gptq_requests_running"] == 0
    assert after["process_resident_memory_bytes"] > 10**8
    (info,) = [it for it in after if it.startswith("gptq_model_info")]
    assert f'model="{ONE}"' in info
    assert 'kernels="cpu' in info
    assert after["gptq_first_token_seconds_count"] > 0


def metrics(served: Running) -> dict[str, float]:
    answer = served.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    lines = [it for it in answer.text.splitlines() if not it.startswith("#")]
    return {name: float(value) for name, _, value in (it.rpartition(" ") for it in lines)}


def test_embeddings_are_refused_in_words(locked: Running) -> None:
    answer = locked.post("/v1/embeddings", model=ONE, input="x")
    assert answer.status_code == 501
    assert "makes no embeddings" in answer.json()["error"]["message"]


def test_what_is_not_there_is_said_in_the_same_shape(locked: Running) -> None:
    for answer, status in (
        (locked.client.get("/nothing"), 404),
        (locked.client.delete("/v1/models"), 405),
    ):
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


# What may be named


def test_only_models_of_the_folder_are_served(tmp_path: Path) -> None:
    with running(tmp_path, names=(ONE, OTHER)) as served:
        models = tmp_path / "models"
        outside = tmp_path / "outside"
        (models / OTHER).rename(outside)
        (models / "linked").symlink_to(outside)
        inside = models / "mixed"
        inside.mkdir()
        for file in outside.iterdir():
            (inside / file.name).symlink_to(file)
        pickled = models / "pickled"
        pickled.mkdir()
        (pickled / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
        (pickled / "gptq_model-4bit-128g.pt").write_bytes(b"x")
        named = [it["id"] for it in served.client.get("/v1/models").json()["data"]]
        assert named == [ONE]
        for name in ("linked", "mixed", "pickled", str(outside), "../outside", f"{ONE}/.."):
            answer = served.chat(model=name, max_tokens=1)
            assert answer.status_code == 404, name
            assert answer.json()["error"]["code"] == "model_not_found"
        assert served.client.get(f"/v1/models/{ONE}").json()["id"] == ONE


def test_a_name_downloads_nothing_unless_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptq_loader_plugin import hub
    from gptq_loader_plugin.errors import HubError

    asked: list[str] = []

    def download(reference: Any, *, progress: object, cancelled: object) -> Path:
        del progress, cancelled
        asked.append(reference.repo)
        raise HubError("the hub cannot be reached", hint="try again")

    monkeypatch.setattr(hub, "download_folder", download)
    with running(tmp_path, names=(ONE,)) as served:
        assert served.chat(model="owner/repo:main").status_code == 404
        assert not asked
    with running(tmp_path, names=(ONE,), downloads=True) as served:
        answer = served.chat(model="owner/repo:main")
        assert answer.status_code == 503
        assert "the hub cannot be reached" in answer.json()["error"]["message"]
        assert asked == ["owner/repo"]
        assert served.chat(model=ONE, max_tokens=1).status_code == 200


def test_a_model_that_cannot_be_loaded_ends_its_request_alone(tmp_path: Path) -> None:
    with running(tmp_path) as served:
        damaged = tmp_path / "models" / OTHER / "model.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:5000])
        answer = served.chat(model=OTHER, max_tokens=1)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_unusable"
        assert str(tmp_path) not in answer.text, "where models lie is nobody's business"
        assert served.chat(max_tokens=1).json()["model"] == ONE


# Where it may be served


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "0.0.0.0"}, "everyone who can reach 0.0.0.0"),
        ({"host": "192.168.1.5"}, "everyone who can reach"),
        ({"host": "::"}, "everyone who can reach"),
        ({"host": "myhost"}, "everyone who can reach"),
        ({"port": 70_000}, "not a port"),
        ({"api_key": ""}, "not empty"),
        ({"api_key": "schlüssel"}, "ASCII"),
        ({"max_queue": 0}, "--max-queue"),
        ({"cors": ("friend.example",)}, "not an origin"),
        ({"cors": ("https://*",)}, "not an origin"),
    ],
)
def test_settings_that_let_strangers_in_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionInvalid, match=words):
        Settings(**settings).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0", "api_key": KEY},
        {"host": "0.0.0.0", "no_auth": True},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "127.0.0.2"},
    ],
)
def test_settings_that_are_safe_or_asked_for_pass(settings: dict[str, Any]) -> None:
    Settings(**settings).check()
    assert KEY not in repr(Settings(**settings))


def test_the_host_is_offered_by_name() -> None:
    (host,) = gptq_hosts()
    assert host.name == "openai"
    assert isinstance(host, Host)
    with pytest.raises(OptionInvalid, match="no option colour"):
        OpenAIHost().install(colour="red")


def test_without_a_model_and_a_page_to_choose_one_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptq_loader_extensions.openai import serving

    monkeypatch.setattr(serving, "_page", lambda: None)
    with pytest.raises(OptionInvalid, match="no model to serve"):
        OpenAIHost().install(port=0, models_dir=tmp_path)


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_an_address_that_cannot_be_had_is_an_error_in_words() -> None:
    with taken_port() as port, pytest.raises(OptionInvalid, match=f"^port {port} is taken"):
        OpenAIHost().install(port=port)
    with pytest.raises(OptionInvalid, match=r"192\.0\.2\.1"):
        OpenAIHost().install(host="192.0.2.1", port=0, api_key=KEY)
