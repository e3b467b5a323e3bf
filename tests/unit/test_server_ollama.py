"""What Ollama's clients do with models: load, unload and list them, and make sure of one."""

from __future__ import annotations

import json
import string
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from altered import DATA, ONE
from served import CHAT, OTHER, Running, running
from waiting import eventually

from gptq_loader_extensions.openai.errors import ApiError
from gptq_loader_extensions.openai.schema.ollama import keep_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

ASK = [{"role": "user", "content": "Hello"}]
OPTIONS = {"num_predict": 4, "temperature": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("served")) as it:
        yield it


def loaded(served: Running) -> list[str]:
    return [it["name"] for it in served.client.get("/api/ps").json()["models"]]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, None),
        (0, 0),
        (-1, None),
        (2.5, 2.5),
        ("0", 0),
        ("0s", 0),
        ("5m", 300),
        ("1h30m", 5400),
        ("1.5s", 1.5),
        ("250ms", 0.25),
        ("-1m", None),
        ("-0s", 0),
    ],
)
def test_a_duration_is_read_as_gos(text: str | float | None, seconds: float | None) -> None:
    assert keep_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "m", "5 m", "1.2.3s", "always", "5M"])
def test_what_is_no_duration_is_refused(served: Running, text: str) -> None:
    with pytest.raises(ApiError, match="is no duration"):
        keep_seconds(text)
    answer = served.post("/api/chat", messages=ASK, keep_alive=text)
    assert answer.status_code == 400
    assert "keep_alive" in answer.json()["error"]


@pytest.mark.parametrize(
    ("route", "empty"),
    [
        ("/api/generate", {"response": ""}),
        ("/api/chat", {"message": {"role": "assistant", "content": ""}}),
    ],
)
def test_asking_for_nothing_loads_and_unloads(
    served: Running, route: str, empty: dict[str, Any]
) -> None:
    answer = served.post(route, model=ONE).json()
    assert (answer["done_reason"], loaded(served)) == ("load", [ONE])
    answer = served.post(route, model=OTHER, keep_alive=0).json()
    assert answer["done_reason"] == "unload"
    assert loaded(served) == [ONE], "another model than the one that is named"
    answer = served.post(route, model=ONE, keep_alive="0").json()
    assert {name: answer[name] for name in empty} == empty
    assert (answer["model"], answer["done"], answer["done_reason"]) == (ONE, True, "unload")
    assert loaded(served) == []
    assert served.client.get("/health").json()["model"] is None
    missing = served.post(route, model="nope", keep_alive=0)
    assert missing.status_code == 404
    assert served.post(route, model=f"{ONE}:latest").json()["done_reason"] == "load"
    assert loaded(served) == [ONE]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/api/chat", {"messages": ASK}),
        ("/api/generate", {"prompt": "Hello"}),
        ("/api/generate", {"prompt": "Hello", "raw": True}),
    ],
)
def test_a_model_is_unloaded_after_its_reply(
    served: Running, route: str, fields: dict[str, Any], *, stream: bool
) -> None:
    body = {"model": ONE, **fields, "options": OPTIONS, "stream": stream}
    kept = served.post(route, **body, keep_alive="5m")
    assert kept.headers["x-ignored-options"] == "keep_alive"
    assert loaded(served) == [ONE]
    last = served.post(route, **body, keep_alive=0)
    assert "x-ignored-options" not in last.headers
    first, again = (json.loads(it.text.splitlines()[-1]) for it in (kept, last))
    assert again["eval_count"] == first["eval_count"] == 4
    eventually(lambda: loaded(served) == [], awaited="the model to be unloaded")
    assert served.post(CHAT, messages=ASK, max_tokens=1).status_code == 200
    assert loaded(served) == [ONE], "the next request loads it again"


def test_lists_are_what_ollamas_own_program_prints(served: Running) -> None:
    """It cuts the digest, and tells the time until a model goes from when that is."""
    served.post("/api/generate", model=ONE)
    assert served.client.head("/api/tags").status_code == 200
    listed = {it["name"]: it for it in served.client.get("/api/tags").json()["models"]}
    weights = sum(file.stat().st_size for file in (DATA / ONE).glob("*.safetensors"))
    assert listed[ONE]["size"] == weights
    digests = {it["digest"] for it in listed.values()}
    assert len(digests) == len(listed)
    assert all(len(it) == 64 and set(it) <= set(string.hexdigits) for it in digests)
    (running_one,) = served.client.get("/api/ps").json()["models"]
    assert running_one["digest"] == listed[ONE]["digest"]
    assert running_one["details"]["quantization_level"] == "4-bit"
    assert (running_one["size"] > 0, running_one["size_vram"]) == (True, 0)
    assert running_one["context_length"] == 512
    assert datetime.fromisoformat(running_one["expires_at"]) > datetime.now(UTC)


def test_a_model_that_is_here_need_not_be_pulled(served: Running) -> None:
    for name in (ONE, f"{ONE}:latest"):
        assert served.post("/api/pull", model=name).text == '{"status": "success"}\n'
        assert served.post("/api/pull", name=name, stream=False).json() == {"status": "success"}
    refused = served.post("/api/pull", model="llama3.2")
    assert refused.status_code == 404
    assert "gptq-loader download" in refused.json()["error"]
