"""A model hub on loopback, for tests: folders are branches, and it can be made to misbehave.

    with HubServer() as hub:
        hub.add("owner/name", folder)                      # as the branch main
        hub.add("owner/name", other, branch="gptq-3bit", access="gated")
        hub.misbehave("*/model.safetensors", cut=100_000, times=2)
        run(program, env={**os.environ, **hub.environment(cache)})
        hub.requests                                       # what was asked, and how

By hand, for a browser or a host program (it prints the environment, and runs until it is killed):

    python tests/hub_server.py --folder owner/name=DIR --folder owner/name:branch=DIR [--port N]

There, `POST /-/misbehave` with the arguments of `misbehave` as JSON breaks it, `POST /-/behave`
mends it, and `GET /-/requests` tells what was asked.

Ways to misbehave: `status` (with `error` as the hub's error code and `headers`), `stall` (seconds
of silence before the answer), `slow` (bytes a second), `cut` (the connection is closed after so
many bytes), `reset` (torn, after so many bytes), `no_range` (a range is answered with everything),
`flip` (the byte at this place is changed), `body` (another body is sent instead).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".gguf", ".model")  # kept by git-lfs, as on the hub
GOOD_TOKEN = "hf_good"
STRANGER = "hf_stranger"  # a token the hub knows, of somebody no owner has let in
Access = Literal["open", "gated", "private"]
API = re.compile(
    r"/api/models/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<what>refs|revision|tree|paths-info|auth-check)(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?"
)
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
SIGNED = re.compile(r"/signed/(?P<repo>[^/]+/[^/]+)/(?P<revision>[^/]+)/(?P<path>.+)")
STEP = 1 << 16
# The branches of a 2023 repository, and which of the tests' tiny checkpoints each is.
REPO = "owner/model-GPTQ"
BRANCHES = {
    "main": "gptq-4bit-noneg-act-sym",
    "gptq-4bit-32g-actorder_True": "gptq-4bit-32g-act-sym",
    "gptq-4bit-64g-actorder_True": "gptq-4bit-64g-act-sym",
    "gptq-4bit-128g-actorder_True": "gptq-4bit-128g-act-sym",
    "gptq-3bit--1g-actorder_True": "gptq-3bit-noneg-act-sym",
    "gptq-3bit-128g-actorder_True": "gptq-3bit-128g-act-sym",
}


@dataclass(slots=True)
class Repository:
    branches: dict[str, Path] = field(default_factory=dict)
    access: Access = "open"


@dataclass(slots=True)
class Fault:
    pattern: str
    times: int | None = None  # how often; None is for ever
    method: str = "GET"
    status: int = 0
    error: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    stall: float = 0
    slow: int = 0
    cut: int | None = None
    reset: int | None = None
    no_range: bool = False
    flip: int | None = None
    body: str | None = None


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    range: str | None
    status: int
    token: str


class HubServer:
    """See the module."""

    def __init__(
        self, *, port: int = 0, tokens: tuple[str, ...] = (GOOD_TOKEN,), redirect: bool = False,
        page: int = 1000,
    ) -> None:  # fmt: skip
        self.repos: dict[str, Repository] = {}
        self.tokens = tokens
        self.redirect = redirect  # large files from a second host name, as from the hub's network
        self.page = page  # entries of a tree's page
        self.requests: list[Request] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._hashes: dict[tuple[Path, int, int], tuple[str, str]] = {}
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self, repo: str, folder: Path, *, branch: str = "main", access: Access = "open"
    ) -> None:
        found = self.repos.setdefault(repo, Repository())
        found.branches[branch] = folder
        found.access = access

    def misbehave(self, pattern: str, **how: Any) -> None:
        """Answer requests for paths like `pattern` in another way; the oldest such rule counts."""
        with self._lock:
            self._faults.append(Fault(pattern, **how))

    def behave(self) -> None:
        """Forget every rule, and send what is being sent slowly at full speed."""
        with self._lock:
            for it in self._faults:
                it.slow = 0
            self._faults.clear()

    def environment(self, home: Path, *, token: str = "") -> dict[str, str]:
        """Give the environment of a program that is to use this hub, with a cache of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def bodies(self, name: str = "") -> list[Request]:
        """List the requests that a file's bytes were sent for, or those of one file."""
        return [
            it
            for it in self.requests
            if it.method == "GET"
            and it.path.endswith(name)
            and it.status in (200, 206)
            and re.search("/resolve/|/signed/", it.path)
        ]

    def fault(self, method: str, path: str) -> Fault:
        with self._lock:
            for it in self._faults:
                if it.times == 0 or it.method != method or not fnmatch(path, it.pattern):
                    continue
                if it.times is not None:
                    it.times -= 1
                return it
        return Fault("")

    def commit(self, repo: str, branch: str) -> str:
        hasher = hashlib.sha1(f"{repo}:{branch}\n".encode())
        for name, path in self.files(repo, branch).items():
            hasher.update(f"{name} {self.hashes(path)[1]}\n".encode())
        return hasher.hexdigest()

    def files(self, repo: str, branch: str) -> dict[str, Path]:
        folder = self.repos[repo].branches[branch]
        found = sorted(it for it in folder.rglob("*") if it.is_file())
        return {it.relative_to(folder).as_posix(): it for it in found}

    def hashes(self, path: Path) -> tuple[str, str]:
        """Give a file's hash as git makes it, and its sha256."""
        status = path.stat()
        key = (path, status.st_mtime_ns, status.st_size)
        if key not in self._hashes:
            git, content = hashlib.sha1(b"blob %d\0" % status.st_size), hashlib.sha256()
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    git.update(block)
                    content.update(block)
            self._hashes[key] = (git.hexdigest(), content.hexdigest())
        return self._hashes[key]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: HubServer

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that has gone is no fault of the server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, sent: bytes) -> None:  # noqa: PLR0911 - one for each kind of page
        hub = self.server.hub
        path = urlsplit(self.path).path
        if path.startswith("/-/"):
            return self._control(path, sent)
        fault = hub.fault(self.command, path)
        time.sleep(fault.stall)
        if fault.status:
            return self._refuse(fault.status, fault.error, "made to fail", fault.headers)
        if fault.body is not None:
            return self._send(200, fault.body.encode(), {"Content-Type": "text/html"})
        if signed := SIGNED.fullmatch(path):
            folder = hub.repos[signed["repo"]].branches[unquote(signed["revision"])]
            return self._send_file(folder / unquote(signed["path"]), {}, fault)
        if path == "/api/whoami-v2":
            return self._whoami()
        if path == "/api/models":
            asked = parse_qs(urlsplit(self.path).query).get("search", [""])[0]
            return self._send_json([{"id": it} for it in hub.repos if asked in it])
        match = API.fullmatch(path) or FILE.fullmatch(path)
        if match is None:
            return self._refuse(404, "", f"no such page: {path}")
        if self._denied(match["repo"], FILE.fullmatch(path) is not None):
            return None
        return self._branch_page(match, fault)

    def _control(self, path: str, sent: bytes) -> None:
        hub = self.server.hub
        if path == "/-/misbehave":
            how = json.loads(sent)
            hub.misbehave(how.pop("pattern"), **how)
        elif path == "/-/behave":
            hub.behave()
        self._send_json([asdict(it) for it in hub.requests] if path == "/-/requests" else {})

    def _denied(self, repo: str, file: bool) -> bool:
        """Refuse as the hub does where this repository is none of the asker's business."""
        hub, token = self.server.hub, self._token()
        known = token in hub.tokens
        if token and not known and token != STRANGER:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return True
        found = hub.repos.get(repo)
        if found is None or (found.access == "private" and not known):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return True
        if file and found.access == "gated" and not known:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to {repo} is restricted")
            return True
        return False

    def _whoami(self) -> None:
        if self._token() not in self.server.hub.tokens:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        return self._send_json({"name": "tester", "type": "user", "orgs": []})

    def _branch_page(self, match: re.Match[str], fault: Fault) -> None:
        hub, repo, asked = self.server.hub, match["repo"], match.groupdict()
        branches = hub.repos[repo].branches
        commits = {it: hub.commit(repo, it) for it in branches}
        if asked.get("what") == "auth-check":
            return self._send_json({})
        if asked.get("what") == "refs":
            listed = [
                {"name": it, "ref": f"refs/heads/{it}", "targetCommit": commit}
                for it, commit in commits.items()
            ]
            return self._send_json({"branches": listed, "converts": [], "tags": []})
        revision = unquote(match["revision"] or "main")
        branch = next((it for it in branches if revision in (it, commits[it])), None)
        if branch is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        path = unquote(match["path"] or "")
        if "what" not in asked:
            return self._file(repo, branch, path, fault)
        if asked["what"] == "tree":
            return self._tree(repo, branch, path)
        return self._send_json(self._info(repo, branch))

    def _info(self, repo: str, branch: str) -> dict[str, object]:
        hub = self.server.hub
        files = hub.files(repo, branch)
        blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        siblings = []
        for name, path in files.items():
            about = self._entry(name, path)
            sibling: dict[str, object] = {"rfilename": name}
            if blobs:
                sibling |= {"size": about["size"], "blobId": about["oid"]}
                if lfs := about.get("lfs"):
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 130}
            siblings.append(sibling)
        card = _front_matter(files["README.md"]) if "README.md" in files else {}
        return {
            "_id": repo, "id": repo, "modelId": repo, "sha": hub.commit(repo, branch),
            "private": hub.repos[repo].access == "private", "disabled": False, "tags": ["gptq"],
            "gated": "auto" if hub.repos[repo].access == "gated" else False, "downloads": 0,
            "likes": 0, "cardData": card, "siblings": siblings,
        }  # fmt: skip

    def _entry(self, name: str, path: Path) -> dict[str, Any]:
        git, content = self.server.hub.hashes(path)
        size = path.stat().st_size
        entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": git}
        if path.suffix in LARGE:
            entry["lfs"] = {"oid": content, "size": size, "pointerSize": 130}
        return entry

    def _tree(self, repo: str, branch: str, under: str) -> None:
        hub, query = self.server.hub, parse_qs(urlsplit(self.path).query)
        whole = query.get("recursive", ["false"])[0].lower() == "true"
        inside = f"{under.rstrip('/')}/" if under else ""
        files = {
            name: path for name, path in hub.files(repo, branch).items() if name.startswith(inside)
        }
        if under and not files:
            return self._refuse(404, "EntryNotFound", f"{under} does not exist")
        entries = [
            self._entry(name, path)
            for name, path in files.items()
            if whole or "/" not in name[len(inside) :]
        ]
        begin = int(query.get("cursor", ["0"])[0])
        end = begin + hub.page
        more = f"recursive={whole}&cursor={end}"
        link = {"Link": f'<{hub.url}{urlsplit(self.path).path}?{more}>; rel="next"'}
        return self._send_json(entries[begin:end], link if end < len(entries) else {})

    def _file(self, repo: str, branch: str, name: str, fault: Fault) -> None:
        hub = self.server.hub
        commit, path = hub.commit(repo, branch), hub.files(repo, branch).get(name)
        if path is None:
            said = {"X-Repo-Commit": commit}
            return self._refuse(404, "EntryNotFound", f"{name} does not exist", said)
        about = self._entry(name, path)
        if "lfs" not in about:
            headers = {"X-Repo-Commit": commit, "ETag": f'"{about["oid"]}"'}
            return self._send_file(path, headers, fault)
        etag = f'"{about["lfs"]["oid"]}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag}
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(about["size"])}
        if not hub.redirect:
            return self._send_file(path, headers, fault)
        elsewhere = f"http://localhost:{hub.port}/signed/{repo}/{quote(branch, safe='')}/{name}"
        return self._send(302, b"", {**headers, "Location": elsewhere})

    def _send_file(self, path: Path, headers: dict[str, str], fault: Fault) -> None:
        size = path.stat().st_size
        begin, end, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and not fault.no_range:
            begin, status = int(asked[1]), 206
            end = min(int(asked[2]) + 1, size) if asked[2] else size
            if begin >= size:
                return self._send(416, b"", {"Content-Range": f"bytes */{size}"})
            headers = {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"}
        self._begin(status, {**headers, "Content-Length": str(end - begin)})
        if self.command == "HEAD":
            return None
        stops = [it for it in (fault.cut, fault.reset) if it is not None]
        until = min(end, begin + stops[0]) if stops else end
        self._stream(path, begin, until, fault)
        if until < end:
            self._break_off(torn=fault.reset is not None)
        return None

    def _stream(self, path: Path, begin: int, end: int, fault: Fault) -> None:
        with path.open("rb") as stream:
            stream.seek(begin)
            while begin < end:
                step = max(1, fault.slow // 100) if fault.slow else STEP
                chunk = bytearray(stream.read(min(step, end - begin)))
                if fault.flip is not None and begin <= fault.flip < begin + len(chunk):
                    chunk[fault.flip - begin] ^= 0xFF
                self.wfile.write(chunk)
                begin += len(chunk)
                if fault.slow:
                    time.sleep(0.01)

    def _break_off(self, *, torn: bool) -> None:
        self.close_connection = True
        self.wfile.flush()
        if torn:
            time.sleep(0.1)  # until the client has read what was sent
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()

    def _send_json(self, content: object, headers: dict[str, str] | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(200, json.dumps(content).encode(), {**kind, **(headers or {})})

    def _refuse(
        self, status: int, error: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        sent = {"X-Error-Message": message, **({"X-Error-Code": error} if error else {})}
        self._send(status, json.dumps({"error": message}).encode(), {**sent, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self._begin(status, {**headers, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        asked = self.headers.get("Range")
        path = unquote(urlsplit(self.path).path)
        request = Request(self.command, path, asked, status, self._token())
        self.server.hub.requests.append(request)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass


def _front_matter(card: Path) -> dict[str, str]:
    """Read the plain fields between the two lines of dashes."""
    head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
    lines = head[1].splitlines() if head else []
    pairs = (it.partition(":") for it in lines if re.match(r"\w+:\s*\S", it))
    return {name: value.strip().strip("'\"") for name, _, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", action="append", required=True, metavar="REPO[:BRANCH]=DIR")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--access", choices=("open", "gated", "private"), default="open")
    parser.add_argument("--redirect", action="store_true", help="large files from a second host")
    arguments = parser.parse_args()
    with HubServer(port=arguments.port, redirect=arguments.redirect) as hub:
        for named in arguments.folder:
            reference, _, folder = named.partition("=")
            repo, _, branch = reference.partition(":")
            hub.add(repo, Path(folder), branch=branch or "main", access=arguments.access)
        sys.stdout.write(f"HF_ENDPOINT={hub.url}\n")
        sys.stdout.flush()
        threading.Event().wait()  # until it is killed


if __name__ == "__main__":
    main()
