"""Killed, out of memory, out of disk, interrupted: the next start works, and nothing is lost.

`GPTQ_LOADER_FAULTS=20` kills so many times as often. Downloads are killed in test_hub_processes.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import resource
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import torch
from altered import DATA, ONE, copy, edit_json
from faulty import Jobs
from hub_server import HubServer
from processes import ServerProcess, read_line, run_process, start_process, start_server
from safetensors.torch import load_file, save_file
from waiting import eventually

from gptq_loader_extensions.gradio.storage.settings_file import ModelSettings, SettingsFile
from gptq_loader_plugin.catalog.local import local_models
from gptq_loader_plugin.checkpoint.weight_files import KEPT
from gptq_loader_plugin.system.memory import free_memory, total_memory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BASE = DATA / "base"
TIMES = int(os.environ.get("GPTQ_LOADER_FAULTS", "1"))

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits another process as Linux does")


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs() as started:
        yield started


def hashes(folder: Path) -> dict[str, str]:
    """Give the hash of every file by its name."""
    return {
        str(it.relative_to(folder)): hashlib.sha256(it.read_bytes()).hexdigest()
        for it in sorted(folder.rglob("*"))
        if it.is_file()
    }


# Killed


def test_settings_that_were_saved_survive_a_kill(jobs: Jobs, tmp_path: Path) -> None:
    draw = random.Random(5)
    file, last = SettingsFile(tmp_path), 0
    for _ in range(12 * TIMES):
        reports = jobs.run("save_settings", tmp_path, last + 1, kill_after=draw.uniform(0, 0.05))
        assert not [note for _, note in reports if note], "every file it found was whole"
        last = reports[-1][0]
        found, note = file.read("model")
        assert not note
        saved = found.context if found is not None and found.context else 0
        assert saved in (last, last + 1), "what was told is there, or the one that was not yet"
        last = saved
    parts = [it for it in tmp_path.iterdir() if it != file.path]
    assert parts, "some were killed while they wrote"
    for part in parts:
        os.utime(part, (0, 0))
    file.save("model", ModelSettings())
    assert list(tmp_path.iterdir()) == [file.path], "what they left has gone"


def test_an_installed_extension_is_whole_after_a_kill(jobs: Jobs, tmp_path: Path) -> None:
    draw = random.Random(6)
    (tmp_path / "modules").mkdir()
    for name in ("server.py", "modules/models.py"):
        (tmp_path / name).touch()
    script = tmp_path / "user_data" / "extensions" / "gptq_loader" / "script.py"
    for _ in range(8 * TIMES):
        jobs.run("install_for_ever", tmp_path, kill_after=draw.uniform(0, 0.05))
        if script.exists():
            compile(script.read_text(), script, "exec")
            assert script.read_text().endswith("\n")
            script.unlink()


def test_a_quantisation_killed_again_and_again_ends_as_one_that_was_not(
    jobs: Jobs, tmp_path: Path
) -> None:
    draw = random.Random(7)
    jobs.run("quantize", DATA / "base", tmp_path / "whole")
    expected = hashes(tmp_path / "whole")
    assert len([it for it in expected if it.endswith(".safetensors")]) > 2
    models = tmp_path / "models"
    environ = {"GPTQ_LOADER_MODELS": str(models)}
    for turn in range(TIMES):
        out = models / f"killed-{turn}"
        for _ in range(8):
            jobs.run("quantize", DATA / "base", out, kill_after=draw.uniform(0, 1.5))
            finished = (out / "config.json").exists()
            listed = [it.name for it in local_models(cache=False, environ=environ)]
            assert (out.name in listed) == finished, "what is not finished is no model"
            if finished and not (out / KEPT).exists():
                break
        else:
            jobs.run("quantize", DATA / "base", out)
        assert hashes(out) == expected


def test_quantising_over_another_checkpoint_leaves_nothing_of_it(
    jobs: Jobs, tmp_path: Path
) -> None:
    jobs.run("quantize", DATA / "base", tmp_path / "whole")
    expected = hashes(tmp_path / "whole")
    (tmp_path / "over" / KEPT).mkdir(parents=True)  # as of a run that was interrupted
    for name in ("model.safetensors", "model-00009-of-00009.safetensors", "config.json"):
        (tmp_path / "over" / name).write_bytes(b"another")
    jobs.run("quantize", DATA / "base", tmp_path / "over")
    assert hashes(tmp_path / "over") == expected


def test_a_load_killed_at_any_moment_leaves_nothing(jobs: Jobs, tmp_path: Path) -> None:
    draw = random.Random(8)
    checkpoint, offload = copy(ONE, tmp_path / "it"), tmp_path / "offload"
    before = hashes(checkpoint)
    expected = jobs.run("load_on_disk", checkpoint, offload)
    for _ in range(6 * TIMES):
        jobs.run("load_on_disk", checkpoint, offload, kill_after=draw.uniform(0, 0.8))
        assert not list(offload.iterdir())
    assert jobs.run("load_on_disk", checkpoint, offload) == expected
    assert hashes(checkpoint) == before


# Out of disk


def test_a_full_disk_leaves_the_settings_that_were_there(jobs: Jobs, tmp_path: Path) -> None:
    file = SettingsFile(tmp_path)
    file.save("model", ModelSettings(context=7))
    ((message, hint),) = jobs.run("save_without_room", tmp_path)
    assert message.startswith("cannot save the settings")
    assert "free some disk space" in hint
    assert file.read("model") == (ModelSettings(context=7), "")
    assert list(tmp_path.iterdir()) == [file.path]


def test_a_full_disk_ends_a_quantisation_that_goes_on_afterwards(
    jobs: Jobs, tmp_path: Path
) -> None:
    reports = jobs.run("quantize_without_room", DATA / "base", tmp_path / "out")
    message, hint = reports[-1]
    assert message.startswith("the disk is full")
    assert "run the same command again" in hint
    assert not list(tmp_path.rglob("*.partial"))
    jobs.run("quantize", DATA / "base", tmp_path / "out")
    jobs.run("quantize", DATA / "base", tmp_path / "whole")
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


# Ctrl-C, and out of memory, in the command


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


# Says where it is, and stays there until it is interrupted: at one of the tensors.
INTERRUPTED = """
import sys, time
from gptq_loader_plugin import events
after = int(sys.argv.pop())
init = events.Progress.__init__
def slow(self, stage, done, *args, **kwargs):
    init(self, stage, done, *args, **kwargs)
    if stage == "weights" and done > after:
        print("now", flush=True)
        time.sleep(60)
events.Progress.__init__ = slow
from gptq_loader_plugin.cli import main
main()
"""


def test_ctrl_c_while_it_loads_ends_it_in_words() -> None:
    draw = random.Random(9)
    for _ in range(TIMES):
        after = str(draw.randrange(50_000))
        command = [sys.executable, "-c", INTERRUPTED, "generate", DATA / ONE, "--prompt", "x"]
        with start_process([*command, after], env=ONE_THREAD) as process:
            assert read_line(process) == "now\n"
            process.send_signal(signal.SIGINT)
            _, words = process.communicate(timeout=60)
        assert process.returncode == 130, words
        assert words.strip().endswith("stopped")
        assert "Traceback" not in words


def test_ctrl_c_while_it_starts_is_no_traceback() -> None:
    code = """
import signal, sys
class Interrupted:
    def find_spec(self, name, *args):
        if name == "typer":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupted())
from gptq_loader_plugin.cli import main
main()
"""
    completed = run_process([sys.executable, "-c", code, "models"])
    assert (completed.stdout, completed.stderr) == ("", "\nstopped\n")
    assert completed.returncode == 130


LIMITED = """
import resource, psutil, torch
import gptq_loader_plugin.loading, gptq_loader_plugin.model.build
import gptq_loader_plugin.generation.loaded
import transformers.models.llama.modeling_llama
from gptq_loader_plugin.cli import main
most = psutil.Process().memory_info().vms + MORE
resource.setrlimit(resource.RLIMIT_AS, (most, most))
main()
"""


@linux
def test_a_command_that_runs_out_of_memory_says_so(models: Path) -> None:
    code = LIMITED.replace("MORE", "250_000_000")
    command = [sys.executable, "-c", code, "generate", models / "big", "--prompt", "x"]
    completed = run_process(command, env=ONE_THREAD)
    assert completed.returncode == 1, completed.stderr
    error, hint = completed.stderr.strip().splitlines()[-2:]
    assert error == "error: out of memory"
    assert hint.startswith("hint: choose a smaller checkpoint")
    assert "Traceback" not in completed.stderr


@linux
@pytest.mark.parametrize("more", [60, 200])
def test_quantising_with_few_addresses_is_refused(more: int, tmp_path: Path) -> None:
    """Where an allocation fails in tokenizers' Rust, the process is aborted."""
    code = LIMITED.replace("MORE", f"({more} << 20)")
    command = [sys.executable, "-c", code, "quantize", BASE, tmp_path / "out"]
    completed = run_process(command, env=ONE_THREAD)
    assert completed.returncode == 1, completed.stderr
    error, hint = completed.stderr.strip().splitlines()[-2:]
    assert re.search(r"needs 6\d\d MB of addresses, and the limit leaves \d+ MB$", error), error
    assert hint == "hint: raise the limit: ulimit -v unlimited"


# A server, and what the system does to it


KEY, TOKEN = "sk-of-this-server-alone", "hf_of_this_person_alone"


@dataclass
class Served:
    """A server in a process of its own.

    Attributes:
        server: the process, and what it has written.
        client: asks it.
        hub: what it downloads from.
    """

    server: ServerProcess
    client: httpx.Client
    hub: HubServer

    def complete(self, prompt: str = "Hello", **more: Any) -> httpx.Response:
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, **more}
        return self.client.post("/v1/completions", json=body)

    def limit(self, more: int) -> None:
        """Let the process have so many more bytes of addresses, and no more."""
        process = psutil.Process(self.server.process.pid)
        most = process.memory_info().vms + more
        process.rlimit(psutil.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    def unlimit(self) -> None:
        infinite = resource.RLIM_INFINITY
        psutil.Process(self.server.process.pid).rlimit(psutil.RLIMIT_AS, (infinite, infinite))


@contextmanager
def serving(
    folder: Path, hub: HubServer, *args: str, port: int = 0, key: str | None = None
) -> Iterator[Served]:
    """Serve the checkpoint "small" of a models folder."""
    command = [sys.executable, "-m", "gptq_loader_plugin", "serve", "small", "--models-dir", folder]
    options = ["--port", str(port), "--json", "--grace", "0", *args]
    environ = {**ONE_THREAD, "TOKENIZERS_PARALLELISM": "0"}
    environ |= hub.environment(folder.parent / "home", token=TOKEN)
    headers = {}
    if key is not None:
        environ["GPTQ_LOADER_API_KEY"] = key
        headers["authorization"] = f"Bearer {key}"
    with (
        start_server([*command, *options], env=environ) as server,
        httpx.Client(base_url=server.url, headers=headers, timeout=300) as client,
    ):
        yield Served(server, client, hub)


BIG_ROWS = 500_000


def make_big(folder: Path) -> None:
    """Make a checkpoint whose vocabulary takes some hundred megabytes."""
    copy(ONE, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    rows = len(tensors["model.embed_tokens.weight"])
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            assert len(tensor) == rows
            tensors[name] = torch.zeros(BIG_ROWS, tensor.shape[1], dtype=tensor.dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    edit_json(folder / "config.json", lambda it: it.update(vocab_size=BIG_ROWS))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder: one that is small, and one whose vocabulary is large."""
    folder = tmp_path_factory.mktemp("served") / "models"
    copy(ONE, folder / "small")
    make_big(folder / "big")
    return folder


@pytest.fixture(scope="module")
def served(models: Path) -> Iterator[Served]:
    """A server that was killed in a reply, started once more, and ends well at last."""
    with HubServer() as hub:
        with serving(models, hub) as first:
            port = first.client.base_url.port
            request = {"prompt": "Hello", "max_tokens": 100_000, "stream": True}
            with first.client.stream("POST", "/v1/completions", json=request) as answer:
                lines = answer.iter_lines()
                next(lines)
                first.server.process.kill()
                with pytest.raises(httpx.TransportError):
                    list(lines)
        with serving(models, hub, "--allow-downloads", port=port or 0, key=KEY) as again:
            yield again
            again.unlimit()
            assert again.complete(model="small").status_code == 200
            with ThreadPoolExecutor(1) as pool:
                answering = pool.submit(again.complete, model="big")

                def loads() -> bool:
                    assert not answering.done()
                    return again.client.get("/health").json()["model"] is None

                eventually(loads, awaited="the load of the large model to begin")
                again.server.process.send_signal(signal.SIGTERM)
                assert answering.result(timeout=300).status_code in (200, 503)
            again.server.process.send_signal(signal.SIGTERM)
            assert again.server.process.wait(timeout=60) == -signal.SIGTERM
        assert "Traceback" not in again.server.log
        assert KEY not in again.server.log
        assert TOKEN not in again.server.log


@linux
def test_a_load_without_enough_memory_fails_and_the_server_lives(served: Served) -> None:
    expected = served.complete().json()["choices"]
    served.limit(300_000_000)  # for its weights, and not for the files they are read from
    try:
        refused = served.complete(model="big")
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "out_of_memory"
        assert "memory" in refused.json()["error"]["message"]
        assert served.complete(model="small").json()["choices"] == expected
    finally:
        served.unlimit()


@linux
def test_a_prompt_without_enough_memory_fails_and_the_server_lives(served: Served) -> None:
    expected = served.complete(model="big").json()["choices"]
    served.limit(60_000_000)  # the probabilities of a part of a prompt take twice as much
    try:
        refused = served.complete("word " * 60, echo=True, logprobs=1)
        assert refused.status_code == 503, refused.text
        error = refused.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == "out_of_memory"
        assert served.complete().json()["choices"] == expected
        health = served.client.get("/health").json()
        assert (health["running"], health["waiting"]) == (0, 0)
    finally:
        served.unlimit()


def test_a_path_of_the_api_that_is_not_there_is_refused_in_its_shape(served: Served) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("DELETE", "/v1/models", 405)):
        answer = served.client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_memory_of_a_container_counts(tmp_path: Path) -> None:
    membership, inner = tmp_path / "cgroup", tmp_path / "groups" / "a" / "b"
    membership.write_text("1:name=old:/x\n0::/a/b\n")
    inner.mkdir(parents=True)
    for group, most in ((inner, "max"), (inner.parent, "5000")):
        (group / "memory.max").write_text(f"{most}\n")
        (group / "memory.current").write_text("3000\n")
        (group / "memory.stat").write_text("anon 2500\ninactive_file 400\nactive_file 100\n")
    groups = tmp_path / "groups"
    assert free_memory(membership=membership, cgroups=groups) == 5000 - 3000 + 400
    (inner / "memory.max").write_text("3000")
    assert free_memory(membership=membership, cgroups=groups) == 400
    nothing = tmp_path / "none"
    assert free_memory(membership=nothing, cgroups=nothing) > 10**6
    assert total_memory(membership=membership, cgroups=groups) == 3000
    (inner / "memory.max").write_text("max")
    assert total_memory(membership=membership, cgroups=groups) == 5000
    assert total_memory(membership=nothing, cgroups=nothing) > 10**6


def test_no_secret_is_ever_written_down(served: Served) -> None:
    secrets = (KEY, TOKEN, "the words of a person")
    header = {"X-Error-Message": f"no such account as Bearer {TOKEN}"}
    for fault in (
        {"status": 401, "headers": header},
        {"status": 403, "headers": header, "error": "GatedRepo"},
        {"status": 500, "headers": header},
        {"reset": 0},
        {"body": "{"},
    ):
        served.hub.misbehave("*", **fault)
        answer = served.complete(secrets[2], model="owner/secret")
        assert 400 <= answer.status_code < 600
        served.hub.behave()
        assert TOKEN not in answer.text
    for headers in (
        {"authorization": f"Bearer {KEY}x"},
        {"x-api-key": f"{KEY}\xe4".encode("latin-1")},
    ):
        served.client.get(f"/v1/models?key={KEY}", headers=headers)
    served.client.get(f"/v1/models/{KEY}")
    served.client.post(f"/v1/{KEY}", content=b"{", headers={"content-type": "application/json"})
    assert served.server.log
    for secret in secrets:
        assert secret not in served.server.log
