"""What a user types names a checkpoint, or says why not; the hub is a small server on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest
from altered import DATA, ONE, copy, plugins

import gptq_loader_plugin as gptq
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.reference import (
    HubReference,
    models_folders,
    parse_hub_reference,
    resolve,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("TheBloke/model-GPTQ", HubReference("TheBloke/model-GPTQ")),
        ("a/b:gptq-4bit-32g-actorder_True", HubReference("a/b", "gptq-4bit-32g-actorder_True")),
        ("a/b:refs/pr/1", HubReference("a/b", "refs/pr/1")),
        ("C:\\models\\x", None),
        ("/models/a/b", None),
        ("a/b/c", None),
        ("a/b:", None),
        ("../a/b", None),
        ("model", None),
    ],
)
def test_hub_references_are_told_from_paths(text: str, found: HubReference | None) -> None:
    assert parse_hub_reference(text) == found


def test_a_branch_is_named_once() -> None:
    assert parse_hub_reference("a/b", revision="dev") == HubReference("a/b", "dev")
    assert parse_hub_reference("a/b:dev", revision="dev") == HubReference("a/b", "dev")
    with pytest.raises(gptq.OptionInvalid, match="names the branch dev, and revision is main"):
        parse_hub_reference("a/b:dev", revision="main")


def test_folders_files_and_the_models_directory(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "models" / "tiny")
    environ = {"GPTQ_LOADER_MODELS": str(tmp_path / "models")}
    for reference in (folder, str(folder), folder / "model.safetensors"):
        assert resolve(reference, plugins=plugins(), environ=environ) == Path(reference)
    assert resolve("tiny", plugins=plugins(), environ=environ) == folder
    downloaded = copy(ONE, tmp_path / "models" / "TheBloke_tiny-GPTQ_dev")
    found = resolve("TheBloke/tiny-GPTQ:dev", plugins=plugins(), environ=environ)
    assert found == downloaded, "as text-generation-webui names a downloaded branch"
    assert models_folders({}) == [Path("models")]


def test_what_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    environ = {"GPTQ_LOADER_MODELS": str(tmp_path)}
    with pytest.raises(gptq.CheckpointNotFound) as caught:
        resolve("tinny", plugins=plugins(), environ=environ)
    assert caught.value.tried == ("tinny", str(tmp_path / "tinny"))
    assert "demo" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "words"), [("model.gguf", "llama.cpp"), ("notes.txt", ".safetensors or .pt")]
)
def test_another_kind_of_file(name: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(gptq.UnsupportedFormat) as caught:
        resolve(tmp_path / name, plugins=plugins())
    assert words in caught.value.hint


def test_one_file_of_a_folder(tmp_path: Path) -> None:
    """A repository with several checkpoints in one folder: the user names the file."""
    folder = copy(ONE, tmp_path)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "two.safetensors").write_bytes(b"another")
    with gptq.load(folder / "one.safetensors", device="cpu", plugins=plugins()) as model:
        assert model.generate("a", gptq.GenerateOptions(max_new_tokens=1)).tokens == 1


def test_a_plugin_may_resolve_a_reference_first() -> None:
    class Finder:
        @hookimpl
        def gptq_resolve(self, reference: str) -> Path | None:
            return DATA / ONE if reference == "tiny!" else None

    found = gptq.Plugins(Finder(), installed=True)
    assert resolve("tiny!", plugins=found) == DATA / ONE
    assert gptq.inspect("tiny!", plugins=found).bits == 4


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download uses, over the tests' checkpoints."""

    repos: dict[str, dict[str, Path]] = {  # noqa: RUF012 - one set for all requests
        "TheBloke/tiny-GPTQ": {"main": DATA / ONE, "3bit": DATA / "gptq-3bit-128g-act-sym"}
    }
    gated = "owner/gated"
    requests: list[str] = []  # noqa: RUF012 - one log for all requests
    interrupt: list[str] = []  # noqa: RUF012 - files whose next download breaks off

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:  # noqa: PLR0911 - one for each kind of answer
        path = unquote(self.path.partition("?")[0])
        self.requests.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/tree/([^/]+)|/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        if match is None:
            return self._fail(404, "EntryNotFound")
        if match[1] == self.gated:
            return self._fail(403, "GatedRepo")
        if match[1] not in self.repos:
            return self._fail(401, "RepoNotFound")
        branches = self.repos[match[1]]
        named = (api and (api[2] or api[3])) or (file and file[2]) or "main"
        commits = {commit(it): folder for it, folder in branches.items()}
        folder = branches.get(named) or commits.get(named)
        if folder is None:
            return self._fail(404, "RevisionNotFound")
        sha = next(it for it, found in commits.items() if found == folder)
        if file:
            return self._file(folder / file[3], sha)
        if api and api[2]:
            return self._json([entry(it) for it in sorted(folder.iterdir())])
        names = [{"rfilename": it.name} for it in sorted(folder.iterdir())]
        return self._json({"id": match[1], "sha": sha, "siblings": names})

    def _file(self, file: Path, sha: str) -> None:
        if not file.is_file():
            return self._fail(404, "EntryNotFound")
        data = file.read_bytes()
        begin = int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return None
        if file.name in self.interrupt:
            self.interrupt.remove(file.name)
            self.wfile.write(data[begin : begin + len(data) // 2])
            self.wfile.flush()
            self.connection.close()
            return None
        self.wfile.write(data[begin:])
        return None

    def _json(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass


def commit(branch: str) -> str:
    return hashlib.sha1(branch.encode(), usedforsecurity=False).hexdigest()


def entry(file: Path) -> dict[str, object]:
    oid = hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
    return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a machine whose hub is here, with an empty cache."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.block_on_close = False
    Hub.requests.clear()
    Hub.interrupt.clear()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {
        **{name: it for name, it in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "GPTQ_LOADER_MODELS": str(tmp_path / "none"),
    }
    server.shutdown()
    thread.join(5)
    server.server_close()


def run(hub: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    # a process of its own: huggingface_hub reads its environment once, when it is imported
    return subprocess.run(
        [sys.executable, "-m", "gptq_loader_plugin", *command],
        env=hub, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_branch_is_fetched_once_and_then_found(hub: dict[str, str]) -> None:
    reference = "TheBloke/tiny-GPTQ:3bit"
    absent = run(hub, "inspect", reference)
    assert absent.returncode == 1
    assert f"hint: fetch it first: gptq-loader download {reference}" in absent.stderr
    done = run(hub, "download", reference)
    assert done.returncode == 0, done.stderr
    assert re.search(r"download: \d+ % TheBloke/tiny-GPTQ:3bit", done.stderr)
    assert "download: 100 %" in done.stderr
    folder = Path(done.stdout.strip())
    stored = (DATA / "gptq-3bit-128g-act-sym" / "model.safetensors").read_bytes()
    assert (folder / "model.safetensors").read_bytes() == stored
    report = json.loads(run(hub, "inspect", reference, "--json").stdout)
    assert (report["bits"], report["reference"]) == (3, reference)
    fetched = len([it for it in Hub.requests if it.startswith("GET") and "/resolve/" in it])
    again = run(hub, "generate", reference, "--prompt", "a", "--max-new-tokens", "1")
    assert again.returncode == 0, again.stderr
    more = len([it for it in Hub.requests if it.startswith("GET") and "/resolve/" in it])
    assert more == fetched, "nothing was fetched twice"


def test_revision_names_the_branch_too(hub: dict[str, str]) -> None:
    done = run(hub, "generate", "TheBloke/tiny-GPTQ", "--revision", "3bit", "--prompt", "a",
               "--max-new-tokens", "1", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert any("/resolve/" in it for it in Hub.requests)
    assert json.loads(run(hub, "inspect", "TheBloke/tiny-GPTQ:3bit", "--json").stdout)["bits"] == 3


def test_without_a_network_the_cache_answers(hub: dict[str, str]) -> None:
    reference = "TheBloke/tiny-GPTQ"
    assert run(hub, "download", reference).returncode == 0
    gone = hub | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = run(gone, "generate", reference, "--prompt", "a", "--max-new-tokens", "1")
    assert done.returncode == 0, done.stderr
    other = run(gone, "generate", f"{reference}:3bit", "--prompt", "a")
    assert other.returncode == 1
    assert "hint: check the network" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_download_that_breaks_off_goes_on(hub: dict[str, str]) -> None:
    Hub.interrupt.append("model.safetensors")
    first = run(hub, "download", "TheBloke/tiny-GPTQ")
    if first.returncode:  # huggingface_hub may also have gone on by itself
        assert "hint: check the network" in first.stderr
        assert run(hub, "download", "TheBloke/tiny-GPTQ").returncode == 0
    assert run(hub, "inspect", "TheBloke/tiny-GPTQ").returncode == 0


@pytest.mark.parametrize(
    ("reference", "message", "hint"),
    [
        ("TheBloke/tiny-GPTQ:5bit", "has no branch, tag or commit 5bit", "branches on its page"),
        ("TheBloke/none", "there is no repository TheBloke/none on the hub", "spelling"),
        ("owner/gated", "owner/gated is gated", "accept its terms"),
    ],
)
def test_what_the_hub_refuses_is_said_in_words(
    hub: dict[str, str], reference: str, message: str, hint: str
) -> None:
    done = run(hub, "download", reference)
    assert done.returncode == 1
    assert message in done.stderr
    assert hint in done.stderr
    assert "Traceback" not in done.stderr


def test_a_git_clone_without_lfs_is_said_in_words(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3896723888\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(gptq.CorruptCheckpoint, match="git-lfs pointer") as caught:
        gptq.inspect(folder, plugins=plugins())
    assert "git lfs pull" in caught.value.hint
