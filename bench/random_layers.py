"""Hold kernels against float64 on random layers, of any size, that the conformance grid lacks.

    python bench/random_layers.py --kernel cpu --count 500 --seed 1
    TRITON_INTERPRET=1 python bench/random_layers.py --kernel triton --count 500

Each layer that the kernel accepts is multiplied by a few inputs. Exit 1 where an answer is wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
from typing import TYPE_CHECKING

import torch

from gptq_loader_plugin.conformance.grid import AXES, Cell
from gptq_loader_plugin.conformance.layers import make_spec
from gptq_loader_plugin.conformance.run import Report, run
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.plugins import Plugins
from gptq_loader_plugin.verdict import Accepted

if TYPE_CHECKING:
    from collections.abc import Iterator

INPUTS = 3  # of each layer
LARGEST = 640  # of K and N, unless --largest is given: an interpreted kernel is slow
SHOWN = 25  # layers between two lines of progress


def random_layers(draw: random.Random, largest: int) -> Iterator[Cell]:
    """Draw layers for ever: any shape, groups, order, zeros and dtypes that a file can hold."""
    while True:
        codes = draw.choice(AXES["codes"])
        step = draw.choice((8, 16, 32, 32, 64))
        rows = step * draw.randint(1, largest // step)
        group = draw.choice(
            ("none", "short", "16", "32", "64", "128", str(8 * draw.randint(1, 40)))
        )
        cell = Cell(
            codes=codes,
            group=group,  # type: ignore[arg-type] - any size
            order=draw.choice(AXES["order"]),
            zeros=draw.choice(AXES["zeros"]),
            shape=f"{rows}x{draw.randint(4, largest)}",
            scales=draw.choice(AXES["scales"]),
            bias=draw.random() < 0.5,
            dtype=AXES["dtype"][0],
            rows=AXES["rows"][0],
            view=AXES["view"][0],
        )
        if rows > 8 and cell.possible:
            yield cell


def inputs(layer: Cell, draw: random.Random) -> Iterator[Cell]:
    """Draw inputs of a layer: from no row to 129."""
    from dataclasses import replace

    for _ in range(INPUTS):
        yield replace(
            layer,
            dtype=draw.choice(AXES["dtype"]),
            rows=draw.choice((1, draw.randint(0, 129))),
            view=draw.choice(AXES["view"]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--count", type=int, default=500, help="layers that the kernel accepts")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--largest", type=int, default=LARGEST, help="of a layer's sides")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = random.Random(options.seed)  # noqa: S311 - of a test
    (kernel,) = (it for it in Plugins(installed=True).kernels() if it.name == options.kernel)
    device = find_device(options.device)
    total, accepted, drawn = Report(kernel.name), 0, 0
    for layer in random_layers(draw, options.largest):
        drawn += 1
        if not isinstance(kernel.consider(make_spec(layer.case), device), Accepted):
            continue
        (report,) = run([kernel], device, [(layer, tuple(inputs(layer, draw)))])
        total.update(report)
        accepted += 1
        if accepted % SHOWN == 0 or accepted == options.count:
            print(
                f"{accepted} layers accepted of {drawn}: {total.passed} products right, "
                f"{len(total.failed)} wrong",
                flush=True,
            )
        if accepted == options.count:
            break
    print(total.text())
    sys.exit(bool(total.failed))


if __name__ == "__main__":
    main()
