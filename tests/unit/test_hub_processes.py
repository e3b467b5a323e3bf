"""Downloads in processes of their own: killed, interrupted, and two of one thing at a time."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
from typing import TYPE_CHECKING

import pytest
from processes import read_line, run_process, start_process
from test_hub_download import MODEL, REPO, WANTED, assert_whole, make_branch, partials
from waiting import eventually

if TYPE_CHECKING:
    import subprocess
    from contextlib import AbstractContextManager
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


def download(*arguments: str | Path) -> AbstractContextManager[subprocess.Popen[str]]:
    """Start a download in a process of its own."""
    return start_process([sys.executable, "-c", DOWNLOAD, REPO, *map(str, arguments)])


def wait_for_bytes(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a folder holds more bytes, or the process has ended."""
    eventually(
        lambda: process.poll() is not None or held(folder) > count,
        seconds=60,
        awaited=f"more than {count} bytes in {folder}",
    )


def wait_for_words(process: subprocess.Popen[str], words: str) -> None:
    """Read what a process says until it says this."""
    lines = iter(lambda: read_line(process, source="stderr"), "")
    assert any(words in line for line in lines), f"it ended without {words}"


def held(folder: Path) -> int:
    """Count the bytes of partial files and of whole ones."""
    files = [it for it in folder.rglob("*") if it.is_file() and not it.is_symlink()]
    return sum(it.stat().st_size for it in files if it.exists())


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
        with download(*to) as process:
            more = draw.randrange(SIZE // (2 * kills))
            wait_for_bytes(place, held(place) + more, process)
            process.kill()
            process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
        for partial in place.rglob("*.incomplete"):
            kept = partial.read_bytes()
            assert any((source / it).read_bytes().startswith(kept) for it in WANTED), "a prefix"
        if plain:
            assert not to[0].exists(), "a folder appears when all of it is there"
    assert killed > kills // 2, "most were killed on the way"
    hub.behave()
    with download(*to) as process:
        folder, words = process.communicate(timeout=60)
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
    with start_process(command) as process:
        wait_for_bytes(tmp_path / "hf", SIZE // 20, process)
        process.send_signal(signal.SIGINT)
        folder, words = process.communicate(timeout=60)
    assert process.returncode == 130, words
    assert "licence: llama2" in words
    assert re.search("stopped; .* is not all here yet; run the same command again", words)
    assert "Traceback" not in words
    assert not folder
    kept = partials(tmp_path)[-1].stat().st_size
    hub.behave()
    completed = run_process(command, check=True)
    assert_whole(type(source)(completed.stdout.strip()), source)
    assert "are here" in completed.stderr
    assert hub.bodies(MODEL)[-1].range == f"bytes={kept}-"


@pytest.mark.parametrize("plain", [False, True], ids=["cache", "folder"])
def test_two_processes_fetch_one_thing_once(
    hub: HubServer, source: Path, tmp_path: Path, plain: bool
) -> None:
    to = [tmp_path / "models" / "tiny"] if plain else []
    hub.misbehave(f"*/{MODEL}", slow=SIZE // 20)
    with download(*to) as first:
        wait_for_bytes(tmp_path / ("models" if plain else "hf"), SIZE // 20, first)
        with download(*to) as second:
            wait_for_words(second, f"process {first.pid} is downloading")
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
    with download() as first:
        wait_for_bytes(tmp_path / "hf", SIZE // 20, first)
        with download() as second:
            wait_for_words(second, f"process {first.pid} is downloading")
            first.kill()
            folder, _ = second.communicate(timeout=60)
    assert_whole(type(source)(folder.strip()), source)
    assert len(hub.bodies(MODEL)) == 2
    assert hub.bodies(MODEL)[-1].range, "it went on with what the first had"


def test_the_program_serves_folders(source: Path, tmp_path: Path) -> None:
    from hub_server import __file__ as program

    with start_process([sys.executable, program, "--folder", f"{REPO}:dev={source}"]) as server:
        name, _, url = read_line(server).strip().partition("=")
        command = ["-m", "gptq_loader_plugin", "download", f"{REPO}:dev", "--to-models"]
        environ = os.environ | {name: url}
        completed = run_process([sys.executable, *command], env=environ, check=True)
    assert completed.stdout.strip() == str(tmp_path / "models" / "owner_tiny-GPTQ_dev")
    assert_whole(tmp_path / "models" / "owner_tiny-GPTQ_dev", source)
