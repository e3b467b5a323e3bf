"""Draw what the other benchmarks wrote as JSON; needs matplotlib.

python bench/plots.py kernels.json kernels.png
python bench/plots.py peers-SHAPE.json... peers.png
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

__all__ = ["draw_kernels", "draw_peers"]


def main() -> None:
    *files, out = map(Path, sys.argv[1:])
    contents = [json.loads(it.read_text(encoding="utf-8")) for it in files]
    if "cells" in contents[0]:
        draw_kernels(contents[0], out)
    else:
        draw_peers(contents, out)


def draw_kernels(content: dict[str, Any], out: Path) -> None:
    """Draw each candidate's time over torch's bfloat16 linear, by rows of x, a panel a shape."""
    mpl.use("agg")
    shapes = list(dict.fromkeys(cell["shape"] for cell in content["cells"]))
    figure, panels = plt.subplots(1, len(shapes), figsize=(5.5 * len(shapes), 4.5), squeeze=False)
    for panel, shape in zip(panels[0], shapes, strict=True):
        cells = [cell for cell in content["cells"] if cell["shape"] == shape]
        for name in cells[0]["medians"]:
            panel.plot(
                [cell["rows"] for cell in cells],
                [cell["medians"][name] / cell["medians"]["torch bf16"] for cell in cells],
                marker="o",
                linestyle="-" if name.startswith("cpu") else "--",
                label=name,
            )
        panel.set(title=shape, xlabel="rows of x", xscale="log", yscale="log")
        panel.set_xticks([cell["rows"] for cell in cells], [cell["rows"] for cell in cells])
        panel.grid(visible=True, alpha=0.3)
    panels[0][0].set_ylabel("time ÷ torch's bfloat16 linear")
    panels[0][0].legend(fontsize="small")
    finish(figure, content["machine"], out)


def draw_peers(contents: list[dict[str, Any]], out: Path) -> None:
    """Draw tokens a second of ours and theirs, a panel for each shape, replies above prompts."""
    mpl.use("agg")
    size = (4.5 * len(contents), 7)
    figure, panels = plt.subplots(2, len(contents), figsize=size, squeeze=False)
    for column, content in enumerate(contents):
        for panel, what in zip(panels[:, column], ("reply", "prompt"), strict=True):
            for place, found in enumerate(content["found"]):
                for shift, who, colour in ((-0.2, "ours", "tab:blue"), (0.2, "theirs", "tab:gray")):
                    height = statistics.median(found[what][who])
                    panel.bar(place + shift, height, 0.4, color=colour, label=who)
            names = [
                f"{it['contest']['program']}\n{it['contest']['weights']}" for it in content["found"]
            ]
            panel.set_xticks(range(len(names)), names, fontsize="x-small")
            panel.set(title=f"{content['shape']}, {what}", ylabel="tokens a second")
    handles, labels = panels[0][0].get_legend_handles_labels()
    panels[0][0].legend(handles[:2], labels[:2], fontsize="small")
    finish(figure, contents[0]["machine"], out)


def finish(figure: Any, machine: dict[str, Any], out: Path) -> None:  # noqa: ANN401 - untyped
    """Write the machine below, and the file."""
    figure.text(0.01, 0.005, f"{machine['processor']}, {machine['threads']} threads", fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
