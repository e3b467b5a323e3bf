"""Say how many replicas some users need, by a simulation of the queue before each of them.

    python examples/sizing.py --users 1,1000,1000000
    python examples/sizing.py --measure demo      # the step times of your machine, for --steps
    python examples/sizing.py --clients 4         # what 4 clients see who never pause

A replica writes up to --max-num-seqs replies side by side. A step gives each of them a token and
takes as long as --steps says for that many; prompts are read between the steps, in parts, at
--prompt-speed. Requests come at random (Poisson). The most that one replica can take within
--first-token and --each-token is searched for; the users' requests are shared among as many as
that needs, at random, which is a little worse than what a router that counts does. The network and
the proxy take no time here.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# As in gptq_loader_plugin.generation.batch: tokens of prompts in a step while replies are written,
# and while none are.
PART, WHOLE = 256, 2048
WARM = 0.1  # of the requests, which find an emptier replica than those that follow
# SmolLM2-135M, 4-bit, one thread of an Intel Xeon with AMX: docs/decisions/decode-step.md
STEPS = "1:14.5,8:22,16:27.5,32:28"


@dataclass(frozen=True)
class Replica:
    """What one replica can do.

    Attributes:
        steps: (sequences, seconds of a step), ascending.
        prompt_speed: tokens of prompts it reads a second.
        most: replies it writes side by side.
    """

    steps: tuple[tuple[int, float], ...]
    prompt_speed: float
    most: int = 16

    def step(self, sequences: int) -> float:
        """Give the seconds of a step, between the measured ones on a straight line."""
        if not sequences:
            return 0.0
        points = self.steps
        if len(points) == 1 or sequences <= points[0][0]:
            return points[0][1]
        above = next((i for i, it in enumerate(points) if it[0] >= sequences), len(points) - 1)
        (n, low), (m, high) = points[above - 1], points[above]
        return low + (high - low) * (sequences - n) / (m - n)


@dataclass(frozen=True)
class Work:
    """What a request is.

    Attributes:
        prompt: its tokens.
        tokens: of its reply.
        vary: whether replies are of random lengths (geometric) around that, or all of that one.
    """

    prompt: int = 200
    tokens: int = 200
    vary: bool = True

    def draw(self, chance: random.Random) -> int:
        """Draw the length of a reply."""
        if not self.vary or self.tokens == 1:
            return self.tokens
        return 1 + int(math.log(1 - chance.random()) / math.log(1 - 1 / self.tokens))


@dataclass
class Seen:
    """What happened.

    Attributes:
        seconds: from the first request that counts to the last one's end.
        busy: of them, those in which a step ran.
        ongoing: the mean number of requests there, those that wait included.
        first: each request's seconds to its first token.
        whole: each request's seconds to its end.
        each: the seconds of a token after the first one.
        tokens: written.
    """

    seconds: float = 0.0
    busy: float = 0.0
    ongoing: float = 0.0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    each: list[float] = field(default_factory=list)
    tokens: int = 0


def simulate(
    replica: Replica,
    work: Work,
    *,
    rate: float = 0.0,
    clients: int = 0,
    count: int = 4000,
    seed: int = 1,
) -> Seen:
    """Have one replica answer requests.

    Args:
        replica: what it can do.
        work: what each request is.
        rate: requests a second, at random moments.
        clients: in place of that, clients who ask again as soon as they have their reply.
        count: how many requests.
        seed: of the random numbers.
    """
    queue = Queue(replica, work, rate, clients, random.Random(seed))  # noqa: S311 - no secret
    while queue.ended < count:
        if queue.ended >= count * WARM and queue.began is None:
            queue.began = queue.now
        queue.go_on()
    queue.seen.seconds = queue.now - (queue.began or 0.0)
    queue.seen.ongoing /= queue.seen.seconds
    return queue.seen


class Queue:
    """One replica and its requests: those to come, that wait, are read, and are written."""

    def __init__(
        self, replica: Replica, work: Work, rate: float, clients: int, chance: random.Random
    ) -> None:
        self.replica, self.work, self.rate, self.chance = replica, work, rate, chance
        self.now, self.step, self.ended = 0.0, 0, 0
        self.began: float | None = None  # when requests began to count
        self.seen = Seen()
        self.arrivals = [0.0] * clients if clients else [chance.expovariate(rate)]
        self.waiting: deque[tuple[float, int]] = deque()  # arrived, tokens
        self.reading: deque[list] = deque()  # arrived, tokens, how much of its prompt is unread
        self.writing: list[tuple[int, float, float, int]] = []  # last step, arrived, first, tokens

    def go_on(self) -> None:
        """Run a step, or several that are alike; or wait for a request."""
        self._admit()
        ongoing = len(self.waiting) + len(self.reading) + len(self.writing)
        if not ongoing:
            self.now = self.arrivals[0]
            return
        seconds, steps, ready = self.replica.step(len(self.writing)), 1, []
        if self.reading:  # before the others' tokens
            ready, reading = self._read()
            seconds += reading
        else:
            steps = self._alike(seconds)
            seconds *= steps
        if self.began is not None:
            self.seen.busy += seconds
            self.seen.ongoing += ongoing * seconds
            ends = self.now + seconds  # those who come meanwhile are there from then on
            self.seen.ongoing += sum(ends - it for it in self.arrivals if it < ends)
        self.now, self.step = self.now + seconds, self.step + steps
        self._end()
        for arrived, tokens, first in ready:
            heapq.heappush(self.writing, (self.step + tokens - 1, arrived, first, tokens))
        self._end()

    def _admit(self) -> None:
        while self.arrivals and self.arrivals[0] <= self.now:
            arrived = heapq.heappop(self.arrivals)
            self.waiting.append((arrived, self.work.draw(self.chance)))
            if self.rate:
                heapq.heappush(self.arrivals, arrived + self.chance.expovariate(self.rate))
        while self.waiting and len(self.reading) + len(self.writing) < self.replica.most:
            self.reading.append([*self.waiting.popleft(), self.work.prompt])

    def _read(self) -> tuple[list[tuple[float, int, float]], float]:
        """Read parts of prompts: those that are read whole, and the seconds it takes."""
        left, seconds, ready = PART if self.writing else WHOLE, 0.0, []
        while self.reading and left > 0:
            read = min(left, self.reading[0][2])
            self.reading[0][2] -= read
            left -= max(read, 1)
            seconds += read / self.replica.prompt_speed
            if not self.reading[0][2]:
                arrived, tokens, _ = self.reading.popleft()
                ready.append((arrived, tokens, self.now + seconds))
        return ready, seconds

    def _alike(self, seconds: float) -> int:
        """Count the steps until a reply ends, or one may join."""
        steps = self.writing[0][0] - self.step
        if self.arrivals and len(self.writing) < self.replica.most:
            steps = min(steps, max(1, math.ceil((self.arrivals[0] - self.now) / seconds)))
        return steps

    def _end(self) -> None:
        while self.writing and self.writing[0][0] <= self.step:
            _, arrived, first, tokens = heapq.heappop(self.writing)
            self.ended += 1
            if not self.rate:
                heapq.heappush(self.arrivals, self.now)
            if self.began is None:
                continue
            self.seen.first.append(first - arrived)
            self.seen.whole.append(self.now - arrived)
            self.seen.tokens += tokens
            if tokens > 1:
                self.seen.each.append((self.now - first) / (tokens - 1))


def share(values: list[float], part: float) -> float:
    """Give the value below which `part` of them lie."""
    ordered = sorted(values)
    return ordered[min(int(part * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def is_good(seen: Seen, *, first: float, each: float) -> bool:
    """Whether 95 of 100 requests got what they should."""
    return share(seen.first, 0.95) <= first and share(seen.each, 0.95) <= each


def most_requests(replica: Replica, work: Work, *, first: float, each: float) -> float:
    """Search for the most requests a second that one replica answers well; 0 where there is none.

    Args:
        replica: what it can do.
        work: what each request is.
        first: seconds to the first token, for 95 of 100.
        each: seconds of every other token, for 95 of 100.
    """
    alone = work.prompt / replica.prompt_speed + work.tokens * replica.step(1)
    low, high = 0.0, replica.most / (work.tokens * replica.step(replica.most))
    if not is_good(simulate(replica, work, rate=0.01 / alone, count=500), first=first, each=each):
        return 0.0
    for _ in range(10):
        middle = (low + high) / 2
        good = is_good(simulate(replica, work, rate=middle), first=first, each=each)
        low, high = (middle, high) if good else (low, middle)
    return low


def size(users: int, replica: Replica, work: Work, arguments: argparse.Namespace) -> dict:
    """Say what some users need, and what they see then."""
    rate = users * arguments.requests_per_hour / 3600
    replicas = max(1, math.ceil(rate / arguments.most_requests))
    seen = simulate(replica, work, rate=rate / replicas)
    held = replica.most * (work.prompt + work.tokens) * arguments.kv_bytes / 2**20
    memory = arguments.process_mb + arguments.weights_mb + held
    fit = min(
        arguments.machine_cores // arguments.threads, int(arguments.machine_gb * 1024 / memory)
    )
    return {
        "users": users,
        "requests_per_second": rate,
        "replicas": replicas,
        "machines": math.ceil(replicas / fit) if fit else None,
        "tokens_per_second": seen.tokens / seen.seconds * replicas,
        "busy": seen.busy / seen.seconds,
        "ongoing_per_replica": seen.ongoing,
        "first_seconds": [share(seen.first, 0.5), share(seen.first, 0.95)],
        "token_seconds": [share(seen.each, 0.5), share(seen.each, 0.95)],
        "replica_mb": memory,
        "kv_mb": held,
    }


def watch(clients: int, replica: Replica, work: Work) -> dict:
    """Say what clients see who never pause."""
    seen = simulate(replica, work, clients=clients, count=max(200, 40 * clients))
    return {
        "clients": clients,
        "tokens_per_second": seen.tokens / seen.seconds,
        "first_seconds": [share(seen.first, 0.5), share(seen.first, 0.95)],
        "token_seconds": [share(seen.each, 0.5), share(seen.each, 0.95)],
    }


def measure(reference: str, *, seconds: float, clock: Callable[[], float]) -> dict:
    """Time steps of 1 to 16 sequences of a real model here, by turns, and reading their prompts."""
    import gptq_loader_plugin as gptq
    from gptq_loader_plugin.generation.batch import Batch

    with gptq.load(reference) as model:
        text = "The harbour was quiet before dawn. " * 40
        ids = model.tokenizer(text)["input_ids"][: model.context // 4]
        options = gptq.GenerateOptions(max_new_tokens=model.context, temperature=0)
        batches = {sequences: Batch(model) for sequences in (1, 2, 4, 8, 16)}
        reading, steps = [], {it: [] for it in batches}
        for sequences, batch in batches.items():
            begun = [model.begin([*ids[it:], *ids[:it]], options) for it in range(sequences)]
            for generation in begun:
                batch.add(generation)
            while any(len(it.pending) > 1 for it in begun):
                alone = all(it.pending for it in begun)
                before, began = sum(len(it.pending) for it in begun), clock()
                list(batch.step())
                if alone:
                    read = before - sum(len(it.pending) for it in begun)
                    reading.append((read, clock() - began))
        until = time.monotonic() + seconds
        while time.monotonic() < until and all(len(it) == n for n, it in batches.items()):
            for sequences, batch in batches.items():
                began = clock()
                list(batch.step())
                steps[sequences].append(clock() - began)
        for batch in batches.values():
            batch.close()
    # Means: what others take of the processor is part of what a step costs.
    times = {n: sum(it) / len(it) for n, it in steps.items()}
    return {
        "steps": ",".join(f"{n}:{it * 1e3:.4g}" for n, it in times.items()),
        "prompt_speed": sum(it for it, _ in reading) / sum(it for _, it in reading),
    }


def read_steps(text: str) -> tuple[tuple[int, float], ...]:
    """Read "1:14.5,8:22": milliseconds by sequences."""
    pairs = (it.split(":") for it in text.split(","))
    return tuple(sorted((int(n), float(ms) / 1e3) for n, ms in pairs))


def numbers(text: str) -> list[int]:
    return [int(it) for it in text.split(",")]


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--users", type=numbers, default=[1, 1_000, 1_000_000])
    parser.add_argument("--requests-per-hour", type=float, default=6, help="of each user")
    parser.add_argument("--prompt", type=int, default=200, help="tokens, those of earlier turns in")
    parser.add_argument("--tokens", type=int, default=200, help="of a reply, in the mean")
    parser.add_argument("--steps", type=read_steps, default=read_steps(STEPS), metavar="N:MS,...")
    parser.add_argument("--prompt-speed", type=float, default=1300, help="tokens a second")
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--first-token", type=float, default=2.0, help="seconds, for 95 of 100")
    parser.add_argument("--each-token", type=float, default=0.1, help="seconds, for 95 of 100")
    parser.add_argument("--weights-mb", type=float, default=115, help="gptq-loader explain says it")
    parser.add_argument("--kv-bytes", type=float, default=23040, help="a token; the same")
    parser.add_argument("--process-mb", type=float, default=500, help="of a replica besides")
    parser.add_argument("--threads", type=int, default=1, help="of a replica")
    parser.add_argument("--machine-cores", type=int, default=64)
    parser.add_argument("--machine-gb", type=float, default=256)
    parser.add_argument("--clients", type=numbers, help="simulate clients who never pause instead")
    parser.add_argument("--same-length", action="store_true", help="every reply has --tokens")
    parser.add_argument("--measure", metavar="REF", help="time a model's steps here instead")
    parser.add_argument("--seconds", type=float, default=20, help="of --measure")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of --measure: leave out what other programs take; with OMP_NUM_THREADS=1",
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def main() -> None:
    arguments = read_arguments()
    if arguments.measure:
        clock = time.process_time if arguments.processor_time else time.monotonic
        found = measure(arguments.measure, seconds=arguments.seconds, clock=clock)
        words = f"--steps {found['steps']} --prompt-speed {found['prompt_speed']:.0f}"
        print(json.dumps(found) if arguments.json else words)
        return
    replica = Replica(arguments.steps, arguments.prompt_speed, arguments.max_num_seqs)
    work = Work(arguments.prompt, arguments.tokens, vary=not arguments.same_length)
    if arguments.clients:
        show([watch(it, replica, work) for it in arguments.clients], as_json=arguments.json)
        return
    goals = {"first": arguments.first_token, "each": arguments.each_token}
    arguments.most_requests = most_requests(replica, work, **goals)
    if not arguments.most_requests:
        raise SystemExit(
            "error: even one request at a time is slower than --first-token and --each-token ask\n"
            "hint: allow more, give a replica more --threads, or take a smaller model"
        )
    show([size(it, replica, work, arguments) for it in arguments.users], as_json=arguments.json)


def show(rows: list[dict], *, as_json: bool) -> None:
    """Print rows as a table, or as JSON."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print("| " + " | ".join(it.replace("_", " ") for it in rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(map(_cell, row.values())) + " |")


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    return f"{value:,.3g}" if isinstance(value, float) and value < 100 else f"{value:,.0f}"


if __name__ == "__main__":
    main()
