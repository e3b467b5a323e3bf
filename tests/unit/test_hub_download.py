"""A branch arrives whole, or there is one clear error, whatever the hub and the network do."""

from __future__ import annotations

import errno
import json
import random
import re
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hub_server import GOOD_TOKEN, STRANGER, HubServer
from huggingface_hub import close_session, snapshot_download, try_to_load_from_cache

import gptq_loader_plugin as gptq
from gptq_loader_plugin.hub import Downloading, cached_folder, download
from gptq_loader_plugin.hub.error_messages import explained
from gptq_loader_plugin.hub.fetch import download_folder
from gptq_loader_plugin.hub.hub_reference import HubReference
from gptq_loader_plugin.reference import resolve

if TYPE_CHECKING:
    from collections.abc import Callable

REPO = "owner/tiny-GPTQ"
HERE = HubReference(REPO)
MODEL = "model.safetensors"
QUICK = (0.0, 0.0, 0.0)  # seconds between tries
SIZE = 300_000


@pytest.fixture
def source(tmp_path: Path, hub: HubServer) -> Path:
    """A branch with large and small files, on the hub."""
    folder = make_branch(tmp_path / "source")
    hub.add(REPO, folder)
    return folder


def make_branch(folder: Path, *, size: int = SIZE, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    (folder / MODEL).write_bytes(draw.randbytes(size))
    (folder / "tokenizer.model").write_bytes(draw.randbytes(5_000))
    (folder / "config.json").write_text(f'{{"model_type": "llama", "seed": {seed}}}')
    (folder / "empty.txt").touch()
    shutil.copyfile(folder / "config.json", folder / "again.json")
    (folder / "README.md").write_text("---\nlicense: llama2\n---\n# A card\n")
    (folder / "notes.pdf").write_bytes(b"not for a loader")
    (folder / "inner").mkdir()
    (folder / "inner" / "other.safetensors").write_bytes(b"another checkpoint")
    return folder


WANTED = ["README.md", "again.json", "config.json", "empty.txt", MODEL, "tokenizer.model"]


def assert_whole(folder: Path, source: Path) -> None:
    assert sorted(it.name for it in folder.iterdir()) == WANTED
    for name in WANTED:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name


def nothing_kept(tmp_path: Path) -> bool:
    return not list((tmp_path / "hf" / "hub").glob("models--*/[rs]*/*"))


def partials(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "hf").rglob("*.incomplete"), key=lambda it: it.stat().st_size)


@pytest.mark.parametrize("redirect", [False, True])
def test_a_branch_lies_in_the_cache_as_huggingface_hub_keeps_it(
    hub: HubServer, source: Path, redirect: bool
) -> None:
    hub.redirect = redirect
    folder = download(HERE)
    assert_whole(folder, source)
    assert snapshot_download(REPO, local_files_only=True) == str(folder)
    assert try_to_load_from_cache(REPO, "config.json") == str(folder / "config.json")
    assert cached_folder(HERE) == folder
    assert cached_folder(HubReference(REPO, hub.commit(REPO, "main"))) == folder
    fetched = len(hub.bodies())
    assert download(HERE) == folder
    assert len(hub.bodies()) == fetched, "nothing was fetched twice"


def test_huggingface_hub_and_we_share_what_is_there(hub: HubServer, source: Path) -> None:
    snapshot_download(REPO, allow_patterns=[MODEL])
    fetched = len(hub.bodies(MODEL))
    assert_whole(download(HERE), source)
    assert len(hub.bodies(MODEL)) == fetched
    other = make_branch(source.parent / "other", seed=1)
    shutil.copyfile(source / "tokenizer.model", other / "tokenizer.model")
    hub.add(REPO, other, branch="other")
    download(HubReference(REPO, "other"))
    assert len(hub.bodies("tokenizer.model")) == 1, "two branches share it"


def test_a_token_does_not_leave_for_another_host(
    hub: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.redirect = True
    hub.add(REPO, source, access="private")
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    assert_whole(download(HERE), source)
    signed = [it for it in hub.requests if it.path.startswith("/signed/")]
    assert signed
    assert {it.token for it in signed} == {""}


def test_a_folder_of_its_own(hub: HubServer, source: Path, tmp_path: Path) -> None:
    reference = HubReference(REPO, "dev")
    hub.add(REPO, source, branch="dev")
    target = tmp_path / "models" / reference.folder_name
    assert download(reference, to=target) == target
    assert_whole(target, source)
    assert [it.name for it in target.parent.iterdir()] == ["owner_tiny-GPTQ_dev"]
    assert resolve(f"{REPO}:dev", plugins=gptq.Plugins()) == target
    assert resolve(REPO, revision="dev", plugins=gptq.Plugins()) == target
    assert not cached_folder(reference)
    # what is there is compared with the hub's hashes: damage is mended, the rest stays
    (target / MODEL).write_bytes(b"0" * SIZE)
    before = len(hub.bodies())
    assert_whole(download(reference, to=target), source)
    assert [it.path.rpartition("/")[2] for it in hub.bodies()[before:]] == [MODEL]
    assert [it.name for it in target.parent.iterdir()] == ["owner_tiny-GPTQ_dev"]


def test_a_folder_that_holds_something_else(source: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "another.safetensors").touch()
    with pytest.raises(gptq.OptionInvalid, match=r"holds another checkpoint's another\.safe"):
        download(HERE, to=tmp_path / "other")
    (tmp_path / "other" / "another.safetensors").unlink()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    folder = download(HERE, to=tmp_path / "other")
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / MODEL).read_bytes() == (source / MODEL).read_bytes()


@pytest.mark.parametrize(
    "how",
    [
        {"cut": 100_000, "times": 4},
        {"cut": 1, "times": 3},
        {"reset": 100_000, "times": 1},
        {"cut": 100_000, "no_range": True, "times": 2},
        {"status": 503, "times": 2},
        {"status": 429, "times": 2, "headers": {"Retry-After": "0"}},
        {"stall": 3, "times": 1},
        {"flip": 200_000, "times": 1},
        {"body": "<html>log in to this network first</html>", "times": 1},
        {"body": "x" * (SIZE + 1), "times": 1},
    ],
    ids=str,
)
def test_what_goes_wrong_for_a_while_ends_well(
    hub: HubServer, source: Path, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    hub.misbehave(f"*/{MODEL}", **how)
    hub.misbehave("*/config.json", **how | {"times": 1})
    assert_whole(download(HERE, waits=QUICK), source)


def test_a_cut_goes_on_where_it_was(hub: HubServer, source: Path) -> None:
    hub.misbehave(f"*/{MODEL}", cut=100_000, times=2)
    download(HERE, waits=QUICK)
    assert [it.range for it in hub.bodies(MODEL)] == [None, "bytes=100000-", "bytes=200000-"]


def test_a_signed_address_that_has_run_out_is_asked_for_again(hub: HubServer, source: Path) -> None:
    hub.redirect = True
    hub.misbehave(f"/signed/*/{MODEL}", status=403, times=1)
    assert_whole(download(HERE, waits=QUICK), source)


@pytest.mark.parametrize("how", [{"cut": 0}, {"flip": 7}, {"status": 503}, {"reset": 0}], ids=str)
def test_what_stays_wrong_is_one_error_and_leaves_nothing_that_looks_right(
    hub: HubServer, source: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    hub.misbehave(f"*/{MODEL}", **how)
    with pytest.raises(gptq.HubError) as caught:
        download(HERE, waits=QUICK)
    words = {
        "cut": "could not be fetched", "flip": "arrived damaged twice",
        "status": "could not answer for owner/tiny-GPTQ:main (status 503)",
        "reset": "could not be fetched",
    }  # fmt: skip
    assert words[next(iter(how))] in caught.value.message
    assert "again" in caught.value.hint or "another" in caught.value.hint
    assert nothing_kept(tmp_path)
    hub.behave()
    assert_whole(download(HERE), source)


@pytest.mark.parametrize(
    ("access", "token", "status", "message", "hint"),
    [
        ("open", "hf_wrong", 401, "does not know your token", "HF_TOKEN"),
        ("gated", "", 401, "is gated: its owner must let you in", "hf auth login"),
        ("gated", STRANGER, 403, "your account has not been let in", "wait for its owner"),
        ("private", "", None, "there is no repository", "log in"),
        ("private", STRANGER, None, "there is no repository", "log in"),
    ],
)
def test_who_may_not(
    hub: HubServer, source: Path, access: Any, token: str, status: int | None,
    message: str, hint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    hub.add(REPO, source, access=access)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(gptq.GPTQLoaderError, match=message) as caught:
        download(HERE, waits=QUICK)
    assert hint in caught.value.hint
    assert getattr(caught.value, "status", None) == status
    assert nothing_kept(tmp_path)
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    assert_whole(download(HERE), source)


def test_what_is_not_there(hub: HubServer, source: Path) -> None:
    hub.add("owner/text", source / "inner")
    (source / "inner" / "other.safetensors").rename(source / "inner" / "story.txt")
    for reference, message, hint in (
        (HubReference(REPO, "5bit"), "has no branch, tag or commit 5bit", f"branches {REPO}"),
        (HubReference("owner/none"), "there is no repository owner/none", "spelling"),
        (HubReference("owner/text"), "holds no .safetensors, .pt or .bin", "branches owner/text"),
    ):
        with pytest.raises(gptq.CheckpointNotFound) as caught:
            download(reference, waits=QUICK)
        assert message in caught.value.message
        assert hint in caught.value.hint
    hub.misbehave("*/config.json", status=404, error="EntryNotFound")
    with pytest.raises(gptq.HubError, match=r"does not have a file of .* \(status 404\)"):
        download(HERE, waits=QUICK)


def test_a_disk_that_is_too_small_is_known_before_anything_is_fetched(
    hub: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil._ntuple_diskusage(10**12, 10**12, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(gptq.HubError, match=r"needs 305 kB more, and the disk of .* has 1 kB free"):
        download(HERE)
    assert not hub.bodies()
    error = explained(HERE, OSError(errno.ENOSPC, "No space left on device"))
    assert "the disk is full" in error.message
    assert "goes on" in error.hint


def test_what_is_to_come_is_announced_with_its_licence(
    hub: HubServer, source: Path, tmp_path: Path
) -> None:
    told: list[Downloading] = []
    seen: list[gptq.Progress] = []
    folder = download(HERE, announced=told.append, progress=seen.append)
    assert told[0].branch.license == "llama2"
    assert told[0].folder == folder
    total = sum((source / name).stat().st_size for name in set(WANTED) - {"again.json"})
    assert told[0].missing == total, "what two names hold is fetched once"
    assert [it.done for it in seen] == sorted(it.done for it in seen)
    assert seen[-1].done == seen[-1].total == total
    assert "licence llama2" in seen[-1].detail
    download(HERE, announced=told.append, progress=lambda it: pytest.fail(f"fetched {it}"))
    assert told[1].missing == 0
    bare = make_branch(tmp_path / "bare", seed=1)
    (bare / "README.md").unlink()
    hub.add(REPO, bare, branch="bare")
    download(HubReference(REPO, "bare"), announced=told.append)
    assert told[2].branch.license == "llama2", "as the card of main says"
    (source / "README.md").unlink()
    download(HERE, announced=told.append)
    assert told[3].branch.license == ""


def test_a_caller_may_cancel_while_nothing_comes(
    hub: HubServer, source: Path, tmp_path: Path
) -> None:
    hub.misbehave(f"*/{MODEL}", slow=20_000)
    stop = threading.Event()

    def told(progress: gptq.Progress) -> None:
        if progress.done > 10_000:
            stop.set()

    with pytest.raises(gptq.DownloadCancelled, match="was stopped") as caught:
        download(HERE, progress=told, cancelled=stop.is_set)
    assert "goes on" in caught.value.hint
    kept = partials(tmp_path)[-1].read_bytes()
    assert (source / MODEL).read_bytes().startswith(kept)
    hub.behave()
    assert_whole(download(HERE), source)
    assert hub.bodies(MODEL)[-1].range == f"bytes={len(kept)}-"


def test_a_cancel_is_heard_while_the_hub_says_nothing(hub: HubServer, source: Path) -> None:
    hub.misbehave("/api/*", stall=60)
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(gptq.DownloadCancelled):  # a minute before the hub would answer
        download(HERE, cancelled=stop.is_set)


def test_a_partial_file_of_rubbish_is_fetched_anew(
    hub: HubServer, source: Path, tmp_path: Path
) -> None:
    content = hub.hashes(source / MODEL)[1]
    for rubbish in (b"x" * 100, b"x" * SIZE, b"x" * (SIZE + 5)):
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        blobs = tmp_path / "hf" / "hub" / "models--owner--tiny-GPTQ" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / f"{content}.incomplete").write_bytes(rubbish)
        assert_whole(download(HERE, waits=QUICK), source)


def test_the_cache_answers_where_the_hub_does_not(
    hub: HubServer, source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ignore: Callable[[gptq.Progress], None] = lambda progress: None  # noqa: E731
    folder = download_folder(HERE, progress=ignore)
    hub.misbehave("/api/*", status=503, headers={"Retry-After": "0"})
    assert download_folder(HERE, progress=ignore) == folder
    assert "using the copy" in caplog.text
    hub.behave()
    hub.misbehave("/api/*", status=401, error="RepoNotFound")
    with pytest.raises(gptq.CheckpointNotFound):
        download_folder(HERE, progress=ignore)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download_folder(HERE, progress=ignore) == folder
    with pytest.raises(gptq.HubError, match="HF_HUB_OFFLINE keeps the hub from being asked"):
        download_folder(HubReference(REPO, "other"), progress=ignore)


def test_a_branch_that_moved_on_is_fetched_and_the_old_one_kept(
    hub: HubServer, source: Path
) -> None:
    old = download(HERE)
    new_source = make_branch(source.parent / "new", seed=1)
    hub.add(REPO, new_source)
    hub.misbehave(f"*/{MODEL}", cut=0)
    with pytest.raises(gptq.HubError):
        download(HERE, waits=())
    assert cached_folder(HERE) == old, "until the new one is all there"
    hub.behave()
    new = download(HERE)
    assert_whole(new, new_source)
    assert_whole(old, source)
    assert cached_folder(HERE) == new


def test_a_hub_or_a_proxy_that_is_not_there(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close_session()
    monkeypatch.setenv("HTTP_PROXY", "http://me:secret@127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(gptq.HubError, match="the proxy named by HTTP_PROXY") as caught:
        download(HERE)
    assert "NO_PROXY" in caught.value.hint
    assert "secret" not in caught.value.message
    close_session()
    monkeypatch.delenv("HTTP_PROXY")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://me:secret@127.0.0.1:9")
    with pytest.raises(gptq.HubError, match=r"http://127\.0\.0\.1:9 \(HF_ENDPOINT\) cannot be"):
        download(HERE)
    close_session()


@pytest.mark.parametrize("branch", ["../../x", "a/../../../x", "/etc", "."])
def test_no_branch_leads_out_of_the_cache(source: Path, branch: str) -> None:
    with pytest.raises(gptq.OptionInvalid, match="no branch is called"):
        cached_folder(HubReference(REPO, branch))


def test_no_file_leads_out_of_the_cache(hub: HubServer, source: Path, tmp_path: Path) -> None:
    (source / "..\\..\\evil.json").write_text("{}")
    with pytest.raises(gptq.HubError, match="gives a file called"):
        download(HERE)
    assert not hub.bodies()


@pytest.mark.parametrize(
    "lie",
    [
        {"sha": "../../x"},
        {"siblings": [{"rfilename": MODEL, "size": 5}]},
        {"siblings": [{"rfilename": MODEL, "size": 5, "blobId": "../../x"}]},
        {"siblings": [{"rfilename": MODEL, "blobId": "a" * 40}]},
    ],
    ids=str,
)
def test_a_mirror_whose_answers_could_not_be_checked(
    hub: HubServer, source: Path, lie: dict[str, Any]
) -> None:
    answer = {"id": REPO, "sha": "b" * 40, "siblings": []} | lie
    hub.misbehave("/api/models/*", body=json.dumps(answer))
    with pytest.raises(gptq.HubError, match="so nothing it sends could be checked") as caught:
        download(HERE)
    assert "HF_ENDPOINT" in caught.value.hint
    assert not hub.bodies()


def test_the_documented_call_runs(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("owner/repo", make_branch(tmp_path / "documented"), branch="branch")
    page = (Path(__file__).parents[2] / "docs" / "hub.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    assert_whole(found["folder"], tmp_path / "documented")
    assert capsys.readouterr().out.endswith("305067 of 305067\n")
