"""Try every model type of the installed transformers, and write the table of docs/architectures.md.

    python tools/families.py [NAME ...] [--jobs 2] [--seconds 600]

Names are transformers' model types; without any, all that go on with a text are tried, those with
pictures last. Rows of families that were not reached keep what an earlier run wrote.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "architectures.md"
TABLE = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- /families -->)", re.DOTALL)
HEAD = "| family | loads | decodes | quantises | decode path | note |\n|---|---|---|---|---|---|\n"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "families")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

if TYPE_CHECKING:
    from collections.abc import Sequence

    from round_trip import Row


def main() -> int:
    """Run the families that are named, or all; return 1 where one loads and is wrong."""
    from tiny_configs import CAUSAL, WITH_PICTURES

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=600)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    rows: list[Row] = []
    names = arguments.names or [*CAUSAL, *WITH_PICTURES]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=40) as pool:
        for name, result in [(name, pool.apply_async(try_family, (name,))) for name in names]:
            try:
                rows.append(result.get(max(end - time.monotonic(), 0)))
            except multiprocessing.TimeoutError:
                print(f"no time left for {name} and those after it")
                break
            print(line(rows[-1]), flush=True)
    write_table(rows)
    counts = Counter((row.loads, row.decodes, row.quantises) for row in rows)
    for (loads, decodes, quantises), count in counts.most_common():
        print(f"{count:4}  loads: {loads}, decodes: {decodes}, quantises: {quantises}")
    return int(any("wrong" in (row.loads, row.quantises) for row in rows))


def try_family(name: str) -> Row:
    """Try one family, in a folder that is deleted afterwards."""
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    from round_trip import round_trip

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        return round_trip(name, Path(folder))


def line(row: Row) -> str:
    """Write one row of the table."""
    # In code, where brackets and angles are none of Markdown's.
    note = "; ".join(row.notes)[:200].replace("`", "'")
    note = f"`{note}`" if note else ""
    cells = (row.model_type, row.loads, row.decodes, row.quantises, row.path, note)
    shown = (re.sub(r"/\S*/tmp\w+/", "", cell).replace("|", "/") for cell in cells)
    return f"| {' | '.join(shown)} |"


def write_table(rows: Sequence[Row]) -> None:
    """Replace the rows of these families in the document, and keep the others."""
    text = DOCUMENT.read_text()
    table = TABLE.search(text)
    old = [] if table is None else table[0].splitlines()[2:]
    lines = {it.split(" | ")[0].removeprefix("| "): it for it in old}
    lines |= {row.model_type: line(row) for row in rows}
    written = HEAD + "".join(f"{lines[name]}\n" for name in sorted(lines))
    DOCUMENT.write_text(TABLE.sub(lambda _: written, text))


if __name__ == "__main__":
    sys.exit(main())
