"""Downloads in processes of their own: killed, interrupted, and two of one thing at a time."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest
from test_hub_download import MODEL, REPO, WANTED, assert_whole, make_branch, partials

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hub_server import HubServer

SIZE = 3_000_000
# as the command does it, without the seconds that its other imports take
DOWNLOAD = """
import os, sys
from pathlib import Path
from gptq_loader_plugin.hub import download
from gptq_loader_plugin.reference import HubReference
to = Path(sys.argv[2]) if len(sys.argv) > 2 else None
told = lambda it: print(it.detail, file=sys.stderr, flush=True)
print(download(HubReference(sys.argv[1]), to=to, progress=told))
"""


@pytest.fixture
def source(tmp_path: Path, hub: HubServer) -> Path:
    folder = make_branch(tmp_path / "source", size=SIZE)
    hub.add(REPO, folder)
    return folder


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, REPO, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for something to happen, or for the process to end."""
    until = time.monotonic() + 60
    while process.poll() is None and not true():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.005)


def wait_for_words(process: subprocess.Popen[str], words: str) -> None:
    """Read what a process says until it says this."""
    assert process.stderr
    assert any(words in line for line in process.stderr), f"it ended without {words}"


def held(folder: Path) -> int:
    """The bytes that are in partial files and in those that are done."""
    found = [it for it in folder.rglob("*") if it.is_file() and not it.is_symlink()]
    return sum(it.stat().st_size for it in found if it.exists())


@pytest.mark.parametrize(("plain", "kills"), [(False, 16), (True, 4)], ids=["cache", "folder"])
def test_killed_at_random_it_finishes_with_the_right_hashes(
    hub: HubServer, source: Path, tmp_path: Path, plain: bool, kills: int
) -> None:
    draw = random.Random(17)
    to = [tmp_path / "models" / "tiny"] if plain else []
    place = tmp_path / ("models" if plain else "hf")
    hub.misbehave(f"*/{MODEL}", slow=SIZE // 4)
    killed = 0
    for _ in range(kills):
        process = start(*to)
        before = held(place)
        more = draw.randrange(SIZE // (2 * kills))
        wait_until(lambda: held(place) > before + more, process)  # noqa: B023 - used at once
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        for partial in place.rglob("*.incomplete"):
            kept = partial.read_bytes()
            assert any((source / it).read_bytes().startswith(kept) for it in WANTED), "a prefix"
        if plain:
            assert not to[0].exists(), "a folder appears when all of it is there"
    assert killed > kills // 2, "most were killed on the way"
    hub.behave()
    process = start(*to)
    folder, words = process.communicate()
    assert process.returncode == 0, words
    assert_whole(type(source)(folder.strip()), source)
    assert not list(place.rglob("*.incomplete"))
    begins = [int(it.range[6:-1]) if it.range else 0 for it in hub.bodies(MODEL)]
    assert begins == sorted(begins), "every try went on from where the last one was killed"
    assert len(set(begins)) > killed // 2


def test_ctrl_c_says_that_the_same_command_goes_on(
    hub: HubServer, source: Path, tmp_path: Path
) -> None:
    hub.misbehave(f"*/{MODEL}", slow=SIZE // 5)
    command = [sys.executable, "-m", "gptq_loader_plugin", "download", REPO]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: held(tmp_path / "hf") > SIZE // 20, process)
    process.send_signal(signal.SIGINT)
    folder, words = process.communicate(timeout=30)
    assert process.returncode == 130, words
    assert "licence: llama2" in words
    assert re.search("stopped; .* is not all here yet; run the same command again", words)
    assert "Traceback" not in words
    assert not folder
    kept = partials(tmp_path)[-1].stat().st_size
    hub.behave()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert_whole(type(source)(done.stdout.strip()), source)
    assert "are here" in done.stderr
    assert hub.bodies(MODEL)[-1].range == f"bytes={kept}-"


@pytest.mark.parametrize("plain", [False, True], ids=["cache", "folder"])
def test_two_processes_fetch_one_thing_once(
    hub: HubServer, source: Path, tmp_path: Path, plain: bool
) -> None:
    to = [tmp_path / "models" / "tiny"] if plain else []
    hub.misbehave(f"*/{MODEL}", slow=SIZE // 20)
    first = start(*to)
    wait_until(lambda: held(tmp_path / ("models" if plain else "hf")) > SIZE // 20, first)
    second = start(*to)
    wait_for_words(second, "another process is downloading")
    hub.behave()
    for process in (first, second):
        folder, words = process.communicate(timeout=60)
        assert process.returncode == 0, words
        assert_whole(type(source)(folder.strip()), source)
    assert len(hub.bodies(MODEL)) == 1


def test_one_of_two_is_killed_and_the_other_goes_on(
    hub: HubServer, source: Path, tmp_path: Path
) -> None:
    hub.misbehave(f"*/{MODEL}", slow=SIZE // 20, times=1)
    first = start()
    wait_until(lambda: held(tmp_path / "hf") > SIZE // 20, first)
    second = start()
    wait_for_words(second, "another process is downloading")
    first.kill()
    first.communicate()
    folder, _ = second.communicate(timeout=60)
    assert_whole(type(source)(folder.strip()), source)
    assert len(hub.bodies(MODEL)) == 2
    assert hub.bodies(MODEL)[-1].range, "it went on with what the first had"


def test_the_program_serves_folders(source: Path, tmp_path: Path) -> None:
    from hub_server import __file__ as program

    server = subprocess.Popen(
        [sys.executable, program, "--folder", f"{REPO}:dev={source}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout
        name, _, url = server.stdout.readline().strip().partition("=")
        done = subprocess.run(
            [sys.executable, "-m", "gptq_loader_plugin", "download", f"{REPO}:dev", "--to-models"],
            env=os.environ | {name: url}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / "models" / "owner_tiny-GPTQ_dev")
        assert_whole(tmp_path / "models" / "owner_tiny-GPTQ_dev", source)
    finally:
        server.kill()
        server.communicate()
