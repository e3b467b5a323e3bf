"""Sampling reports as one HTML file, that needs neither a server nor the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gptq_loader_plugin.sampling.report import Report

__all__ = ["viewer_page"]

HEAD = """
<header><div><h1>Sampling reports</h1>
<input type="search" id="search" placeholder="Search prompts and replies" aria-label="Search">
<select id="setting" aria-label="Setting"></select>
<select id="output" aria-label="Reply"></select>
<label><input type="checkbox" id="diff" checked> mark differences</label>
<label><input type="checkbox" id="differing"> only where replies differ</label>
<label><input type="checkbox" id="params"> parameters</label>
<button type="button" id="expand">Open all</button>
<button type="button" id="collapse">Close all</button>
<label>add reports <input type="file" id="more" multiple accept=".json"></label>
<span id="count" role="status"></span></div></header>
<div class="scroll" id="summary"></div><main id="prompts"></main>
"""


def viewer_page(reports: Sequence[Report]) -> str:
    """Return the page, with the reports in it.

    What models wrote is data there and is put into the page as text alone.
    """
    folder = Path(__file__).parent
    content = [
        {
            **report.model_dump(),
            "stats": [[[it.model_dump() for it in each] for each in row] for row in report.stats],
        }
        for report in reports
    ]
    # no "<", so that nothing in it can end the element that it is in
    data = json.dumps(content, ensure_ascii=False).replace("<", "\\u003c")
    style = (folder / "viewer.css").read_text(encoding="utf-8")
    script = (folder / "viewer.js").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Sampling reports</title>'
        f"<style>{style}</style>{HEAD}"
        f'<script type="application/json" id="reports">{data}</script><script>{script}</script>'
        "</html>\n"
    )
