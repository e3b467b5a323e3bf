"""Kill what writes at random moments, and run two of it at a time; count what is corrupt.

    python tests/unit/writers.py --kills 40 [--writer quantize]

Each writer is run by a process of its own (`faulty.py`) and killed so many times; what it left must
be whole, and a run that is let alone afterwards must end as one that was never killed. Exit 1 where
anything was corrupt.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faulty import Jobs

__all__ = ["FILES", "Killed", "kill_checkpoint", "kill_file", "two_checkpoints", "two_files"]

BASE = Path(__file__).parents[1] / "data" / "checkpoints" / "base"
FILES = ("settings", "figures", "tiles", "listed")  # what faulty.py writes a number to


@dataclass(slots=True)
class Killed:
    """What came of the kills.

    Attributes:
        writer: what was killed.
        tried: how many runs were killed, or ran beside another.
        killed: of how many the kill came before their end.
        later: of how many it came after the first block.
        corrupt: what was not as it must be.
    """

    writer: str
    tried: int = 0
    killed: int = 0
    later: int = 0
    corrupt: list[str] = field(default_factory=list)

    def check(self, right: bool, problem: str) -> None:
        """Note a problem where something is not right."""
        if not right:
            self.corrupt.append(problem)

    def __str__(self) -> str:
        """Write it out for people."""
        later = f", {self.later} after the first block" if self.later else ""
        return (
            f"{self.writer}: {self.tried} tried, {self.killed} killed on the way{later}, "
            f"{len(self.corrupt)} corrupt"
        )


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file by its name."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def kill_checkpoint(
    jobs: Jobs, folder: Path, *, job: str = "quantize", kills: int, seed: int = 1
) -> Killed:
    """Kill what makes a checkpoint, of one kind or another, and let each go on to its end."""
    draw, result = random.Random(seed), Killed(job)
    began = time.monotonic()
    expected = _undisturbed(jobs, folder, job)
    lasts = (time.monotonic() - began) / len(expected)
    turn = 0
    while result.tried < kills:
        turn += 1
        out = folder / f"{job}-{turn}"
        made, finished = _made(job, out), False
        for _ in range(draw.choice((1, 2, 4))):
            # what is there is of the same options, or of others
            bits = draw.choice((3, 4, 4, 4))
            wait = draw.uniform(0, lasts)
            jobs.run(job, BASE, out, bits, kill_after=wait)
            result.tried += 1
            finished = (made / "config.json").is_file()
            result.later += any((made / ".quantize").glob("block-*"))
            result.killed += not finished or (made / ".quantize").exists()
            if finished:
                found = {name: it for name, it in hashes(made).items() if not name.startswith(".")}
                result.check(found in expected.values(), f"{made}: finished, and another's bytes")
                if not (made / ".quantize").exists():
                    break
        else:
            # a demo that is finished stays as it is
            right = list(expected.values()) if finished and job != "quantize" else [expected[4]]
            jobs.run(job, BASE, out, 4)
            result.check(hashes(made) in right, f"{made}: goes on to other bytes")
        result.check(not list(made.glob(".*")), f"{made}: something is left over")
        shutil.rmtree(out)
    return result


def two_checkpoints(one: Jobs, other: Jobs, folder: Path, *, pairs: int, seed: int = 1) -> Killed:
    """Make a checkpoint twice at a time in one folder, with the same options and with others."""
    draw, result = random.Random(seed), Killed("two quantize")
    expected = _undisturbed(one, folder, "quantize")
    for pair in range(pairs):
        out = folder / f"two-{pair}"
        widths = (4, 4 if pair % 2 else 3)
        ended: dict[int, list[Any]] = {}

        def make(number: int, run: Jobs, bits: int, to: Path, ends: dict[int, list[Any]]) -> None:
            ends[number] = run.run("quantize_or_refuse", BASE, to, bits)

        threads = [
            threading.Thread(target=make, args=(number, run, bits, out, ended))
            for number, (run, bits) in enumerate(zip((one, other), widths, strict=True))
        ]
        for thread in threads:
            thread.start()
            time.sleep(draw.uniform(0, 0.2))
        for thread in threads:
            thread.join(600)
        result.tried += 2
        last = [reports[-1] for reports in ended.values()]
        won = [widths[number] for number, reports in ended.items() if reports[-1] == "made"]
        result.check(len(won) == 1, f"{out}: {last}")
        result.check(bool(won) and hashes(out) == expected[won[0]], f"{out}: other bytes")
        shutil.rmtree(out)
    return result


def _undisturbed(jobs: Jobs, folder: Path, job: str) -> dict[int, dict[str, str]]:
    """Make the checkpoint of each width once, alone; return their hashes."""
    expected = {}
    for bits in (3, 4):
        out = folder / f"{job}-alone-{bits}"
        jobs.run(job, BASE, out, bits)
        expected[bits] = hashes(_made(job, out))
    return expected


def _made(job: str, out: Path) -> Path:
    """Return the folder that a job makes, for what it is called with."""
    from gptq_loader_plugin.quantize.demo import demo_folder

    return demo_folder({"GPTQ_LOADER_CACHE": str(out)}) if job == "prepare_demo" else out


def kill_file(jobs: Jobs, folder: Path, kind: str, *, kills: int, seed: int = 1) -> Killed:
    """Kill what writes one number after the other to a file; each that was told must be there."""
    from faulty import read_number

    draw, result, last = random.Random(seed), Killed(kind), 0
    for _ in range(kills):
        reports = jobs.run(
            "write_numbers", kind, folder, last + 1, kill_after=draw.uniform(0, 0.05)
        )
        result.tried += 1
        result.killed += 1
        last = max([last, *reports])
        try:
            found = read_number(kind, folder)
        except ValueError as error:
            result.check(False, f"{kind}: {error}")
            continue
        if kind != "tiles":  # which hold no number
            known = f"{kind}: {last} was written, and {found} is there"
            result.check(found in (last, last + 1), known)
            last = max(last, found)
    return result


def two_files(one: Jobs, other: Jobs, folder: Path, kind: str, *, entries: int) -> Killed:
    """Have two processes add entries to one file at a time; all must be there."""
    from faulty import read_entries

    result = Killed(f"two {kind}", tried=2 * entries)
    threads = [
        threading.Thread(target=run.run, args=("add_entries", kind, folder, name, entries))
        for run, name in ((one, "one"), (other, "other"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    expected = {f"{name}-{number}" for name in ("one", "other") for number in range(entries)}
    if kind == "tiles":
        expected = {"2", "3", "4", "8"}
    missing = expected - read_entries(kind, folder)
    result.check(not missing, f"{kind}: {sorted(missing)[:5]} of {len(expected)} are lost")
    return result


def main() -> None:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from faulty import Jobs

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40, help="of each writer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--writer", choices=("quantize", "prepare_demo", *FILES), action="append")
    options = parser.parse_args()
    writers = options.writer or ["quantize", "prepare_demo", *FILES]
    corrupt = 0
    kills, seed = options.kills, options.seed
    with tempfile.TemporaryDirectory() as name, Jobs() as jobs, Jobs() as other:
        for writer in writers:
            folder = Path(name, writer)
            if writer in FILES:
                results = [kill_file(jobs, folder, writer, kills=kills, seed=seed)]
                results += [two_files(jobs, other, folder / "two", writer, entries=kills)]
            else:
                results = [kill_checkpoint(jobs, folder, job=writer, kills=kills, seed=seed)]
            if writer == "quantize":
                pairs = max(kills // 4, 2)
                results += [two_checkpoints(jobs, other, folder / "two", pairs=pairs, seed=seed)]
            for result in results:
                sys.stdout.write("\n  ".join([str(result), *result.corrupt]) + "\n")
                sys.stdout.flush()
                corrupt += len(result.corrupt)
    sys.exit(bool(corrupt))


if __name__ == "__main__":
    main()
