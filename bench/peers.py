"""Measure a whole model beside other programs: load, prompt, reply, memory.

    python bench/peers.py SHAPE --data DIR --peer llama.cpp=PYTHON --peer gptqmodel=PYTHON ...

SHAPE is SmolLM2-135M, TinyLlama-1.1B, Llama-2-7B or another of bench/shapes.py: checkpoints and
GGUF files of random weights are made in DIR, once. Each program runs in a process of its own, with
the Python of an environment that holds it (docs/benchmarks.md), ik_llama.cpp as its own benchmark
binary; a program that no --peer names is left out, and said to be. This package and one other
program take turns: a prompt of one, a prompt of the other, a reply of one, a reply of the other,
--rounds times, with the speed of memory measured before each. Ratios are medians of the rounds'
own. `--ours REF --gguf FILE` measures a real checkpoint beside a real file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import Machine, describe
from shapes import SHAPES, make_checkpoint
from worker import Worker

from gptq_loader_kernels.cpu import CpuKernel
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.measure.speed import MEMORY_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAMS = ("llama.cpp", "ik_llama.cpp", "gptqmodel", "transformers", "vllm")
PAUSE = 0.5  # seconds before each turn, in which the other program's threads stop spinning


@dataclass(frozen=True, slots=True)
class Contest:
    """Another program, the files it reads, and those this package reads beside it.

    Attributes:
        program: one of PROGRAMS.
        weights: what its weights are, in words.
        path: its file or folder.
        token_bytes: the weights it reads for a token of a reply, where known.
        reference: what this package loads.
    """

    program: str
    weights: str
    path: Path
    token_bytes: int | None
    reference: str


@dataclass(slots=True)
class Found:
    """What was measured of one contest: ours and theirs, round by round."""

    contest: Contest
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    load: dict[str, list[float]] = field(default_factory=dict)
    prompt: dict[str, list[float]] = field(default_factory=dict)  # tokens a second
    reply: dict[str, list[float]] = field(default_factory=dict)  # tokens a second
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)  # bytes a second

    def add(self, name: str, who: str, value: float) -> None:
        """Add what one round gave."""
        getattr(self, name).setdefault(who, []).append(value)

    def ratio(self, name: str) -> float:
        """Give the median over rounds of ours to theirs."""
        found = getattr(self, name)
        return statistics.median(
            ours / theirs for ours, theirs in zip(found["ours"], found["theirs"], strict=True)
        )

    def share(self, who: str) -> float | None:
        """Give the bytes of weights read a second of a reply as a share of memory's speed."""
        size = self.facts[who].get("token_bytes")
        if size is None or not self.bandwidth:
            return None
        return statistics.median(self.reply[who]) * size / statistics.median(self.bandwidth)


def main() -> None:
    arguments = parse()
    pythons = {"transformers": sys.executable, **dict(arguments.peer)}
    contests = []
    for contest in list_contests(arguments):
        if contest.program not in pythons:
            hint = f"--peer {contest.program}=PYTHON"
            say(f"{contest.program} is left out: name the Python that has it ({hint})")
        elif not arguments.only or contest.program in arguments.only:
            contests.append(contest)
    machine = describe(arguments.threads)
    print(f"{arguments.shape}: {machine}\n", flush=True)
    print(
        f"Prompt {arguments.prompt}, reply {arguments.tokens} after {arguments.depth}, "
        f"{arguments.rounds} rounds; tokens a second, ours then theirs; "
        "share is of memory's speed beside it.\n"
    )
    print("| program | weights | reply | prompt | share | load s | memory GB | memory GB/s |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    results = []
    for contest in contests:
        found = Match(contest, pythons[contest.program], arguments, machine).play()
        print(row(found), flush=True)
        results.append(found)
    if arguments.json:
        content = {"shape": arguments.shape, "machine": asdict(machine), **options(arguments)}
        content["found"] = [to_json(it) for it in results]
        arguments.json.write_text(json.dumps(content, indent=2), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--data", type=Path, default=Path("build/bench"))
    parser.add_argument("--peer", type=peer, action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--only", action="append", choices=PROGRAMS, help="may be repeated")
    parser.add_argument("--ours", help="load this in place of random weights; for llama.cpp alone")
    parser.add_argument("--gguf", type=Path, help="the file that llama.cpp loads beside --ours")
    parser.add_argument("--backend", help="the kernel this package uses")
    parser.add_argument("--head", choices=["stored", "int8"], help="as of gptq-loader bench")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--depth", type=int, default=16, help="tokens before the reply")
    parser.add_argument("--threads", type=int, help="of each program; all the processor has")
    parser.add_argument("--memory", type=float, default=16, help="GB that two programs may hold")
    parser.add_argument("--json", type=Path, help="write everything here")
    return parser.parse_args()


def peer(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in PROGRAMS or not python:
        raise argparse.ArgumentTypeError(f"write NAME=PATH, NAME one of {', '.join(PROGRAMS)}")
    return name, python


def list_contests(arguments: argparse.Namespace) -> Iterator[Contest]:
    """List what can be measured of a shape, its files made."""
    from dense_shapes import write_dense
    from gguf_shapes import MIXES, token_bytes, write_gguf

    if arguments.gguf:
        size = token_bytes(arguments.gguf)
        words = arguments.gguf.stem.rpartition(".")[2]
        yield Contest("llama.cpp", words, arguments.gguf, size, arguments.ours)
        return
    name, data = arguments.shape, arguments.data
    shape = SHAPES[name]
    wanted = arguments.only or PROGRAMS
    group = 128 if shape.hidden % 128 == 0 else 64  # which every program takes
    ours = make_checkpoint(data / f"{name}-4bit-{group}g", shape, group_size=group)
    for program in ("llama.cpp", "ik_llama.cpp"):
        for mix in MIXES if program in wanted else ():
            file = write_gguf(data / f"{name}.{mix}.gguf", shape, mix=mix)
            yield Contest(program, mix, file, token_bytes(file), str(ours))
    words = f"GPTQ 4-bit {group}g"
    if "gptqmodel" in wanted:
        yield Contest("gptqmodel", words, ours, None, str(ours))
    if "vllm" in wanted:
        yield Contest("vllm", words, ours, None, str(ours))
    if "transformers" in wanted:
        dense = write_dense(data / f"{name}-bf16", shape)
        size = sum(it.stat().st_size for it in dense.glob("*.safetensors"))
        size -= 0 if shape.tied else 2 * shape.vocabulary * shape.hidden
        yield Contest("transformers", "bfloat16", dense, size, str(ours))


class Match:
    """This package and another program, each in its process, taking turns."""

    def __init__(
        self, contest: Contest, python: str, arguments: argparse.Namespace, machine: Machine
    ) -> None:
        script = f"run_{contest.program.replace('.', '_')}.py"
        longest = max(arguments.prompt, arguments.depth + arguments.tokens) + 1
        threads = {
            "OMP_NUM_THREADS": str(machine.threads),
            "BENCH_DEPTH": str(arguments.depth),
            "BENCH_CONTEXT": str(max(1024, -(-longest // 256) * 256)),
        }
        asked = {"BENCH_BACKEND": arguments.backend, "BENCH_HEAD": arguments.head}
        ours = {name: value for name, value in asked.items() if value}
        theirs = threads
        if contest.program == "ik_llama.cpp":  # a binary, and not a Python
            python, theirs = sys.executable, threads | {"BENCH_BINARY": python}
        self._arguments = arguments
        self._workers = {
            "ours": Worker(sys.executable, "run_ours.py", contest.reference, threads | ours),
            "theirs": Worker(python, script, str(contest.path), theirs, clean=True),
        }
        self._found = Found(contest)

    def play(self) -> Found:
        """Measure every round; in each, both programs are loaded anew if memory is short."""
        contest = self._found.contest
        together = size_of(contest.path) + size_of(Path(contest.reference))
        play = self._apart if 1.1 * together > self._arguments.memory * 1e9 else self._together
        try:
            play()
        finally:
            for who in self._workers:
                self._stop(who)
        self._found.facts["theirs"].setdefault("token_bytes", contest.token_bytes)
        return self._found

    def _together(self) -> None:
        for who in self._workers:
            self._start(who)
        for _ in self._rounds():
            for what in ("prompt", "reply"):
                for who in self._workers:
                    self._turn(who, what)

    def _apart(self) -> None:
        for _ in self._rounds():
            for who in self._workers:
                self._start(who)
                for what in ("prompt", "reply"):
                    self._turn(who, what)
                self._stop(who)

    def _rounds(self) -> Iterator[int]:
        contest, rounds = self._found.contest, self._arguments.rounds
        for count in range(1, rounds + 1):
            say(f"{contest.program} {contest.weights}: round {count} of {rounds}")
            yield count

    def _start(self, who: str) -> None:
        facts = self._workers[who].start()
        self._found.add("load", who, facts.pop("load_seconds"))
        self._found.facts[who] = facts
        self._workers[who].ask("prompt", self._arguments.prompt)  # the first is slower
        self._workers[who].ask("reply", 4)

    def _turn(self, who: str, what: str) -> None:
        time.sleep(PAUSE)
        if who == "ours":
            rate = CpuKernel().read_bandwidth(MEMORY_BYTES, find_device("cpu"))
            self._found.bandwidth += [] if rate is None else [rate]
        count = self._arguments.prompt if what == "prompt" else self._arguments.tokens
        self._found.add(what, who, count / self._workers[who].ask(what, count))

    def _stop(self, who: str) -> None:
        if self._workers[who].running:
            self._found.memory[who] = self._workers[who].stop()


def size_of(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(it.stat().st_size for it in path.glob("*.safetensors"))


def row(found: Found) -> str:
    """Lay one contest out, ratios first."""

    def pair(name: str, digits: int) -> str:
        ours, theirs = (statistics.median(getattr(found, name)[it]) for it in ("ours", "theirs"))
        return f"**{found.ratio(name):.2f}** ({ours:,.{digits}f} / {theirs:,.{digits}f})"

    shares = " / ".join(
        "-" if (share := found.share(who)) is None else f"{100 * share:.0f} %"
        for who in ("ours", "theirs")
    )
    loads = " / ".join(f"{statistics.median(found.load[it]):.1f}" for it in ("ours", "theirs"))
    held = " / ".join(f"{found.memory[it]['peak'] / 1e9:.2f}" for it in ("ours", "theirs"))
    rates = [it / 1e9 for it in found.bandwidth]
    speed = f"{statistics.median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})" if rates else "-"
    contest = found.contest
    name = f"{contest.program} {found.facts['theirs'].get('version', '')}".strip()
    cells = (name, contest.weights, pair("reply", 1), pair("prompt", 0), shares, loads, held, speed)
    return f"| {' | '.join(cells)} |"


def options(arguments: argparse.Namespace) -> dict[str, int]:
    names = {
        "prompt_tokens": "prompt",
        "reply_tokens": "tokens",
        "depth": "depth",
        "rounds": "rounds",
    }
    return {name: getattr(arguments, it) for name, it in names.items()}


def to_json(found: Found) -> dict[str, Any]:
    content = asdict(found)
    content["contest"]["path"] = str(found.contest.path)
    ratios = {name: found.ratio(name) for name in ("prompt", "reply")}
    shares = {who: found.share(who) for who in ("ours", "theirs")}
    return {**content, "ratio": ratios, "share_of_memory": shares}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
