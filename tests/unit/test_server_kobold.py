"""The routes of Kobold's clients, and of text-generation-webui's."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE
from served import COMPLETE, OTHER, Brake, Running, load, running
from waiting import eventually, join

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GENERATE = "/api/v1/generate"
# What SillyTavern's Kobold page sends with its own defaults.
SILLYTAVERN = {
    "use_story": False,
    "use_memory": False,
    "use_authors_note": False,
    "use_world_info": False,
    "max_context_length": 400,
    "rep_pen": 1.1,
    "rep_pen_range": 256,
    "rep_pen_slope": 1,
    "temperature": 0.7,
    "tfs": 1,
    "top_a": 0,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0,
    "typical": 1,
    "sampler_order": [6, 0, 1, 3, 4, 2, 5],
    "singleline": False,
    "use_default_badwordsids": False,
    "mirostat": 0,
    "mirostat_eta": 0.1,
    "mirostat_tau": 5,
    "grammar": "",
    "sampler_seed": -1,
    "stop_sequence": ["You:", "\nUser "],
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("served")) as started:
        yield started


def greedy(served: Running, prompt: str, count: int) -> str:
    assert served.server.settings.models_dir is not None
    with load(served.server.settings.models_dir / ONE) as model:
        options = gptq.GenerateOptions(max_new_tokens=count, temperature=0)
        return model.generate(prompt, options).text


def test_kobold_generates_what_the_model_says_alone(served: Running) -> None:
    text = greedy(served, "Once upon", 20)
    request = {"prompt": "Once upon", "max_length": 20, "temperature": 0}
    answer = served.post(GENERATE, **request)
    assert answer.json() == {"results": [{"text": text, "finish_reason": "length"}]}
    with served.client.stream("POST", "/api/extra/generate/stream", json=request) as stream:
        lines = [it for it in stream.iter_lines() if it]
    assert set(lines[::2]) == {"event: message"}
    events = [json.loads(it.removeprefix("data: ")) for it in lines[1::2]]
    assert "".join(it["token"] for it in events) == text
    assert [it["finish_reason"] for it in events][-1] == "length"


def test_a_clients_own_defaults_are_accepted(served: Running) -> None:
    answer = served.post(GENERATE, prompt="Hello", max_length=4, **SILLYTAVERN)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-ignored-options"] == "sampler_order"
    refused = served.post(GENERATE, prompt="Hello", **{**SILLYTAVERN, "mirostat": 2})
    assert refused.status_code == 400
    assert refused.json()["detail"]["msg"] == refused.json()["error"]["message"]


def test_a_long_prompt_loses_its_beginning_and_never_its_memory(served: Running) -> None:
    request: dict[str, Any] = {"max_length": 5, "max_context_length": 64, "temperature": 0}
    long = "word " * 400 + "end"
    for more in ({}, {"memory": "Be kind."}):
        served.lines.clear()
        assert served.post(GENERATE, prompt=long, **more, **request).status_code == 200
        line = eventually(  # it is written after the answer
            lambda: next((it for it in served.lines if it.get("tokens") == 5), None),
            awaited="the line of the request in the log",
        )
        assert line["prompt_tokens"] == 64 - 5


def test_the_routes_that_clients_ask_first(served: Running) -> None:
    get = served.client.get
    assert get("/api/v1/model").json() == {"result": ONE}
    assert get("/api/v1/info/version").json() == {"result": "1.2.5"}
    assert get("/api/extra/version").json()["result"] == "KoboldCpp"
    assert get("/api/v1/config/max_context_length").json() == {"value": 512}
    assert get("/api/v1/config/max_length").json()["value"] > 0
    assert get("/api/extra/perf").json()["queue"] == 0
    count = served.post("/api/extra/tokencount", prompt="Hello there").json()
    assert count["value"] == len(count["ids"]) > 0
    assert served.client.post("/api/extra/abort").json()["success"] == "false"
    assert get("/v1/internal/model/info").json()["model_name"] == ONE
    assert get("/v1/internal/model/list").json()["model_names"] == [ONE, OTHER]
    ids = served.post("/v1/internal/encode", text="Hello").json()
    assert served.post("/v1/internal/token-count", text="Hello").json()["length"] == ids["length"]
    assert served.post("/v1/internal/decode", tokens=ids["tokens"]).json()["text"] == "Hello"
    best = served.post("/v1/internal/logits", prompt="Hello", top_logits=5).json()
    assert 0 < sum(best.values()) <= 1
    assert len(best) == 5


def test_a_model_is_loaded_by_name_alone(served: Running) -> None:
    assert served.client.put("/api/v1/model", json={"model": OTHER}).status_code == 200
    assert served.client.get("/api/v1/model").json() == {"result": OTHER}
    load_route = "/v1/internal/model/load"
    assert served.post(load_route, model_name=ONE).json() == "OK"
    assert served.client.get("/api/v1/model").json() == {"result": ONE}
    assert served.post(load_route, model_name=ONE, args={"cpu": True}).status_code == 400
    for name in ("../models/" + ONE, "/etc", ONE + "/../" + OTHER, ONE + "\0"):
        assert served.post(load_route, model_name=name).status_code == 404
        assert served.client.put("/api/v1/model", json={"model": name}).status_code == 404


def test_abort_and_check_find_a_reply_by_its_key(tmp_path: Path) -> None:
    brake = Brake()
    with running(tmp_path, names=(ONE,), loads=brake) as served:
        answers: dict[str, Any] = {}

        def ask(key: str | None) -> None:
            body = {"prompt": "Hello", "max_length": 400, "temperature": 0, "genkey": key}
            answers[str(key)] = served.post(GENERATE, **body).json()

        first = threading.Thread(target=ask, args=("KCPP1",))
        first.start()
        brake.wait_for_reply()
        brake.leave.release(3)
        second = threading.Thread(target=ask, args=("KCPP2",))
        second.start()
        eventually(
            lambda: served.client.get("/api/extra/perf").json()["queue"] == 1,
            awaited="the second request to wait",
        )

        def written() -> str:
            check = served.post("/api/extra/generate/check", genkey="KCPP1").json()
            text: str = check["results"][0]["text"]
            return text

        text = eventually(written, awaited="the first reply to begin")
        assert served.post("/api/extra/generate/check").json() == {"results": [{"text": ""}]}
        assert served.post("/api/extra/abort", genkey="nobody").json()["success"] == "false"
        assert served.post("/api/extra/abort", genkey="KCPP2").json()["success"] == "true"
        join(second)
        assert answers["KCPP2"]["error"]["code"] == "stopped"
        assert served.post("/api/extra/abort", genkey="KCPP1").json()["success"] == "true"
        brake.leave.release(2)
        join(first)
        (result,) = answers["KCPP1"]["results"]
        assert result["text"].startswith(text)
        assert result["finish_reason"] == "stop"
        assert brake.cancelled == 1
        brake.let_go()
        assert served.post(COMPLETE, prompt="Hi", max_tokens=1).status_code == 200


def test_nobody_reads_or_ends_what_another_client_is_told(tmp_path: Path) -> None:
    brake = Brake()
    with running(tmp_path, names=(ONE,), loads=brake, max_num_seqs=2) as served:
        answers: list[dict[str, Any]] = []

        def ask(route: str, **body: Any) -> None:
            answers.append(served.post(route, prompt="Hello", temperature=0, **body).json())

        chat = threading.Thread(target=ask, args=(COMPLETE,), kwargs={"max_tokens": 300})
        chat.start()
        brake.wait_for_reply()
        check, abort = "/api/extra/generate/check", "/api/extra/abort"
        assert served.post(check).json() == {"results": [{"text": ""}]}
        assert served.post(abort).json()["success"] == "false"
        first = threading.Thread(target=ask, args=(GENERATE,), kwargs={"max_length": 300})
        first.start()

        def joined() -> bool:
            brake.leave.release(1)  # it joins between two tokens of the other
            return brake.began.acquire(timeout=0.05)

        eventually(joined, awaited="the second reply to begin")
        assert served.post(abort).json()["success"] == "true", "the only one of its kind"
        brake.let_go()
        join(chat, first)
        (completed,) = [it for it in answers if "choices" in it]
        assert completed["usage"]["completion_tokens"] == 300
        (result,) = next(it for it in answers if "results" in it)["results"]
        assert result["finish_reason"] == "stop"
