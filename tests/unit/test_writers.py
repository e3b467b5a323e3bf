"""What writes files is killed, and runs beside its like: nothing is corrupt, nothing is lost.

`writers.py` does the same for as long as one likes.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TYPE_CHECKING

import pytest
from altered import DATA
from faulty import Jobs
from processes import run_process, start_process
from safetensors import safe_open
from waiting import eventually
from writers import (
    FILES,
    hashes,
    kill_checkpoint,
    kill_file,
    two_checkpoints,
    two_files,
)

from gptq_loader_plugin.checkpoint.weight_files import KEPT, KEPT_LOCK
from gptq_loader_plugin.system.file_lock import changing, held_and_removed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1"}
KILLS = 3


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    with Jobs() as started:
        yield started


@pytest.fixture(scope="module")
def other() -> Iterator[Jobs]:
    with Jobs() as started:
        yield started


@pytest.mark.parametrize("job", ["quantize", "prepare_demo"])
def test_a_checkpoint_is_whole_after_kills(jobs: Jobs, tmp_path: Path, job: str) -> None:
    result = kill_checkpoint(jobs, tmp_path, job=job, kills=KILLS)
    assert not result.corrupt
    assert result.tried >= KILLS


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_whole_after_kills(jobs: Jobs, tmp_path: Path, kind: str) -> None:
    assert not kill_file(jobs, tmp_path, kind, kills=KILLS).corrupt


def test_two_runs_into_one_folder_make_one_checkpoint(
    jobs: Jobs, other: Jobs, tmp_path: Path
) -> None:
    assert not two_checkpoints(jobs, other, tmp_path, pairs=2).corrupt


@pytest.mark.parametrize("kind", FILES)
def test_two_processes_that_change_one_file_lose_nothing(
    jobs: Jobs, other: Jobs, tmp_path: Path, kind: str
) -> None:
    assert not two_files(jobs, other, tmp_path, kind, entries=6).corrupt


def test_a_block_of_another_run_is_made_again(jobs: Jobs, tmp_path: Path) -> None:
    """Whatever lies there: of a run with other options, or cut short."""
    jobs.run("quantize", DATA / "base", tmp_path / "alone", 4)
    for bits, cut in ((3, False), (8, False), (4, True)):
        out = tmp_path / f"over-{bits}"
        early, late = 0.0, 2.0  # seconds: no block yet, and the checkpoint complete
        while not list((out / KEPT).glob("block-0000*")):
            seconds = (early + late) / 2
            jobs.run("quantize", DATA / "base", out, bits, kill_after=seconds)
            if (out / "config.json").exists():
                shutil.rmtree(out)
                late = seconds
            else:
                early = seconds
            if late - early < 0.01:  # how long it takes differs from run to run
                early, late = 0.0, 2.0
        (block,) = (out / KEPT).glob("block-0000*")
        with safe_open(block, "pt") as tensors:
            assert tensors.metadata()["fingerprint"] == (out / KEPT / "fingerprint").read_text()
        if cut:
            block.write_bytes(block.read_bytes()[:-100])
        jobs.run("quantize", DATA / "base", out, 4)
        assert hashes(out) == hashes(tmp_path / "alone")


def test_the_command_names_the_process_that_has_the_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptq_loader_plugin", "quantize", DATA / "base"]
    options = ["--samples", "4", "--seq-len", "64"]
    out = tmp_path / "out"
    with start_process([*command, out, *options], env=ENVIRON) as first:
        eventually((out / f"{KEPT_LOCK}.holder").exists, 60, awaited="the first's lock")
        second = run_process([*command, out, *options, "--bits", "8"], env=ENVIRON)
        assert second.returncode == 1
        error, hint = second.stderr.strip().splitlines()[-2:]
        assert error == f"error: process {first.pid} is writing to {out}"
        assert hint.startswith("hint: wait until it has ended, or name another folder")
        assert first.wait(timeout=120) == 0
    assert not list(out.glob(".*"))
    with held_and_removed(tmp_path / "new" / KEPT_LOCK, waiting=print):
        refused = run_process([*command, tmp_path / "new", *options], env=ENVIRON)
    assert f"process {os.getpid()} is writing to" in refused.stderr
    assert not list((tmp_path / "new").iterdir())
    missing = run_process([*command[:-1], tmp_path / "none", tmp_path / "never"], env=ENVIRON)
    assert missing.returncode == 1
    assert not (tmp_path / "never").exists(), "a run that cannot begin leaves no folder"


def test_a_lock_is_one_whatever_becomes_of_its_file(tmp_path: Path) -> None:
    """Many in turn, each of whom removes the file: two never hold it at a time."""
    code = """
import sys
from pathlib import Path
from gptq_loader_plugin.system.file_lock import changing
counter = Path(sys.argv[1])
for _ in range(60):
    with changing(counter):
        value = int(counter.read_text()) if counter.exists() else 0
        counter.write_text(str(value + 1))
"""
    counter = tmp_path / "counter"
    command = [sys.executable, "-c", code, counter]
    with (
        start_process(command) as one,
        start_process(command) as two,
        start_process(command) as three,
    ):
        for process in (one, two, three):
            _, words = process.communicate(timeout=120)
            assert process.returncode == 0, words
    assert counter.read_text() == "180"
    assert list(tmp_path.iterdir()) == [counter]


def test_a_file_that_another_process_keeps_is_an_error_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_loader_plugin.system.file_lock.PATIENCE", 0.3)
    file = tmp_path / "settings.json"
    with (
        changing(file),
        pytest.raises(TimeoutError, match=f"process {os.getpid()} is writing"),
        changing(file),
    ):
        pass
