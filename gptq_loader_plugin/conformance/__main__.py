"""Run the whole grid: `python -m gptq_loader_plugin.conformance --kernel NAME`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from gptq_loader_plugin.conformance.cover import pairwise_cover
from gptq_loader_plugin.conformance.declined import ALLOW_NONE, accepts_nothing
from gptq_loader_plugin.conformance.grid import possible_layers
from gptq_loader_plugin.conformance.run import Report, by_layer
from gptq_loader_plugin.conformance.spread import run_in_parts
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.errors import GPTQLoaderError
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cells that the command line names.

    Returns:
        0 where each cell passed or was declined, and every kernel accepted some.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        device = find_device(options.device)
        offered = [kernel.name for kernel in Plugins(installed=True).kernels()]
    except GPTQLoaderError as error:
        parser.error(f"{error.message}; {error.hint}")
    names = tuple(options.kernel or offered)
    if unknown := sorted(set(names) - set(offered)):
        parser.error(
            f"no installed plugin offers a kernel named {unknown[0]!r}; there is "
            f"{', '.join(offered)}"
        )
    layers = list(possible_layers())
    work = by_layer(pairwise_cover(layers) if options.cells == "cover" else None, layers)
    work = work[options.part[0] - 1 :: options.part[1]]
    reports = {name: Report(name) for name in names}
    for done, part in run_in_parts(names, device, work, jobs=options.jobs):
        for report in part:
            reports[report.kernel].update(report)
        failed = sum(len(report.failed) for report in reports.values())
        sys.stderr.write(f"\r{done:,} of {len(work):,} layers, {failed:,} cells failed ")
        sys.stderr.flush()
    sys.stderr.write("\n")
    if options.json:
        sys.stdout.write(
            json.dumps([report.json() for report in reports.values()], indent=2) + "\n"
        )
    else:
        sys.stdout.write("\n".join(report.text() for report in reports.values()))
    untested = [
        report for report in reports.values() if report.declined_all and not options.allow_none
    ]
    for report in untested:
        sys.stderr.write(f"error: {accepts_nothing(report.kernel, report.declined)}\n")
    return int(bool(untested) or any(report.failed for report in reports.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gptq_loader_plugin.conformance",
        description="Hold kernels against float64 over the whole grid of layers and inputs.",
    )
    parser.add_argument(
        "--kernel", action="append", help="a kernel to test; may be repeated; all by default"
    )
    parser.add_argument("--device", help="where to test it; the best one by default")
    parser.add_argument(
        "--cells",
        choices=("whole", "cover"),
        default="whole",
        help="the whole grid, or the pairwise cover that the tests run",
    )
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="I/N", help="only the I-th of N parts"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes to run, one thread each")
    parser.add_argument("--json", action="store_true", help="print the reports as JSON")
    parser.add_argument("--allow-none", action="store_true", help=ALLOW_NONE)
    return parser


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 1/3")
    return int(part), int(parts)


if __name__ == "__main__":
    sys.exit(main())
