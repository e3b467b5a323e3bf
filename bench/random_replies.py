"""Hold replies to random prompts, and to edits of them, against one call without a cache.

    python bench/random_replies.py --seconds 600 --seed 1 [--kernel cpu] [--engine]
        [--kv-cache int8]

Families of `gptq_loader_plugin.conformance.families` take turns. Each prompt is a new one, or an
earlier sequence that goes on, was cut short, or had tokens changed or put in; it is read in parts
of a random size, and begins with what is kept of those before it. A context of 8 bits may be off by
what that rounds (INT8_TOLERANCE); models that cannot have one are passed over, and mixtures, whose
tokens may go to other experts for it. Exit 1 where logits are wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from typing import TYPE_CHECKING, Literal

from gptq_loader_plugin.conformance.families import FAMILIES
from gptq_loader_plugin.conformance.models import TOLERANCE, TOLERANCES, make_subject
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.engine.attention import NotPaged
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.generation.kv_cache import PrefixCache
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from gptq_loader_plugin.conformance.models import Subject

REPLIES = 12  # of one model
LONGEST = 200  # tokens of a prompt
INT8_TOLERANCE = 0.05


def main() -> int:
    """Try families until the time is over; return 1 where one answered wrongly."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kernel", default="cpu")
    parser.add_argument("--engine", action="store_true")
    parser.add_argument("--kv-cache", choices=["int8"])
    arguments = parser.parse_args()
    plugins, draw = Plugins(installed=True), random.Random(arguments.seed)  # noqa: S311 - a seeded draw
    kernel = next(it for it in plugins.kernels() if it.name == arguments.kernel)
    attention = None
    if arguments.engine:
        attention = plugins.hook.gptq_paged_attention(device=find_device("cpu"))
    end, models, replies, wrong = time.monotonic() + arguments.seconds, 0, 0, 0
    while time.monotonic() < end:
        family = draw.choice(list(FAMILIES))
        try:
            subject = make_subject(family, kernel, attention, seed=draw.randrange(1 << 30))
        except NotPaged:
            continue
        if arguments.kv_cache and any(
            "expert" in name for name, _ in subject.model.named_modules()
        ):
            continue
        limit = TOLERANCES.get(family, TOLERANCE)
        if arguments.kv_cache:
            limit += INT8_TOLERANCE
        try:
            found = write_some(subject, draw, arguments.kv_cache)
        except OptionInvalid:
            continue
        models += 1
        replies += REPLIES
        for number, worst in enumerate(found):
            if worst > limit:
                wrong += 1
                print(f"{family}, reply {number}: off by {worst:.1e}", flush=True)
    print(f"{models} models, {replies} replies: {wrong} wrong")
    return int(wrong > 0)


def write_some(subject: Subject, draw: random.Random, kind: Literal["int8"] | None) -> list[float]:
    """Write replies of one model; return how far the worst logits of each were off."""
    kept, worst = PrefixCache(kind, max_sequences=draw.randint(1, 3)), []
    written: list[list[int]] = []
    for _ in range(REPLIES):
        subject.worst = 0.0
        ids = edited(draw.choice(written), draw) if written and draw.random() < 0.8 else new(draw)
        written.append(subject.write(ids, kept, part=draw.choice((1, 3, 7, 16, 40, 100, 2048))))
        worst.append(subject.worst)
    return worst


def new(draw: random.Random) -> list[int]:
    """Draw a prompt."""
    return [draw.randrange(3, 250) for _ in range(draw.randint(1, LONGEST // 2))]


def edited(ids: list[int], draw: random.Random) -> list[int]:
    """Change a sequence as people change what they wrote."""
    at = draw.randrange(len(ids))
    how = draw.randrange(5)
    if how == 0:
        ids = ids + new(draw)[:40]
    elif how == 1:
        ids = ids[: at + 1]
    elif how == 2:
        ids = [*ids[:at], draw.randrange(3, 250), *ids[at + 1 :]]
    elif how == 3:
        ids = [*ids[:at], *new(draw)[:10], *ids[at:]]
    return ids[:LONGEST]


if __name__ == "__main__":
    sys.exit(main())
