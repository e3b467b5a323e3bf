"""The tests' hub is one to huggingface_hub: what it does here, it would do with the real one."""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING

import pytest
from altered import DATA, ONE
from hub_server import GOOD_TOKEN, STRANGER, HubServer
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

if TYPE_CHECKING:
    from pathlib import Path

REPO = "owner/name"


def test_what_it_serves(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, DATA / ONE)
    hub.add(REPO, DATA / "base", branch="feature/x")
    hub.page = 2
    hub.redirect = True
    api = HfApi()
    commits = {it.name: it.target_commit for it in api.list_repo_refs(REPO).branches}
    assert set(commits) == {"main", "feature/x"}
    info = api.model_info(REPO, revision="feature/x", files_metadata=True)
    assert info.sha == commits["feature/x"]
    names = sorted(it.name for it in (DATA / ONE).iterdir())
    assert sorted(it.path for it in api.list_repo_tree(REPO)) == names, "over several pages"
    assert len([it for it in hub.requests if "/tree/" in it.path]) == -(-len(names) // 2)
    folder = snapshot_download(REPO, revision="feature/x", cache_dir=tmp_path / "other")
    for file in (DATA / "base").iterdir():
        assert (type(file)(folder) / file.name).read_bytes() == file.read_bytes()
    metadata = api.get_safetensors_metadata(REPO)
    assert "model.layers.0.mlp.up_proj.qweight" in metadata.weight_map
    assert api.whoami(token=GOOD_TOKEN)["name"] == "tester"
    assert [it.id for it in api.list_models(search="name")] == [REPO]


def test_whom_it_refuses(hub: HubServer, tmp_path: Path) -> None:
    hub.add(REPO, DATA / ONE, access="gated")
    hub.add("owner/secret", DATA / ONE, access="private")

    def fetch(repo: str, token: str | bool, **options: str) -> str:
        where = {"filename": "config.json", "cache_dir": str(tmp_path / "other")} | options
        return hf_hub_download(repo, token=token, **where)

    for token in (False, STRANGER):
        with pytest.raises(GatedRepoError):
            fetch(REPO, token)
        with pytest.raises(RepositoryNotFoundError):
            fetch("owner/secret", token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        fetch(REPO, "hf_wrong")
    with pytest.raises(RevisionNotFoundError):
        fetch(REPO, GOOD_TOKEN, revision="none")
    with pytest.raises(EntryNotFoundError):
        fetch(REPO, GOOD_TOKEN, filename="none.json")
    assert fetch(REPO, GOOD_TOKEN)
    assert fetch("owner/secret", GOOD_TOKEN)


def test_how_it_misbehaves(hub: HubServer) -> None:
    hub.add(REPO, DATA / ONE)
    path = f"/{REPO}/resolve/main/config.json"
    whole = (DATA / ONE / "config.json").read_bytes()

    def get(**headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", hub.port, timeout=5)
        try:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    assert get() == (200, whole)
    assert get(Range="bytes=10-19") == (206, whole[10:20])
    assert get(Range=f"bytes={len(whole)}-")[0] == 416
    for how in ({"cut": 10}, {"reset": 10}):
        hub.misbehave(path, times=1, **how)
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            get()
    hub.misbehave(path, times=1, flip=3)
    assert get()[1] == whole[:3] + bytes([whole[3] ^ 0xFF]) + whole[4:]
    hub.misbehave(path, times=1, no_range=True)
    assert get(Range="bytes=10-19") == (200, whole)
    hub.misbehave(path, times=1, status=503)
    assert get()[0] == 503
    hub.misbehave(path, times=1, body="other")
    assert get() == (200, b"other")
    assert get() == (200, whole), "no fault is left"
