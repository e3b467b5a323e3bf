"""The branches of one repository, answered in one go from a hub: killed, gone on with, offline."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING

import altered
import pytest
from hub_server import BRANCHES, REPO, HubServer
from processes import run_process, start_process
from report_form import differences
from waiting import eventually

from gptq_loader_plugin.sampling.report import read_report
from gptq_loader_plugin.sampling.settings import usual_settings

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PROMPTS = ["What is the sea?", "Say hello.\nTwice."]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        for branch, name in BRANCHES.items():
            server.add(REPO, altered.DATA / name, branch=branch)
        yield server


def command(folder: Path) -> list[str | Path]:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(f"{json.dumps(it)}\n" for it in PROMPTS))
    return [
        *(sys.executable, "-m", "gptq_loader_plugin", "sample"),
        *(f"{REPO}:{branch}" for branch in BRANCHES),
        *("--prompts", prompts, "--out", folder, "--html", folder / "page.html"),
        *("--max-new-tokens", "3", "--device", "cpu", "--no-check", "--json"),
    ]


def test_six_branches_are_one_page_and_six_reports(hub: HubServer, tmp_path: Path) -> None:
    environ = {**os.environ, **hub.environment(tmp_path / "hf"), **altered.PLUGINS}
    with start_process(command(tmp_path), env=environ) as process:
        eventually(lambda: len(finished(tmp_path)) >= 2, 300, awaited="two reports")
        process.send_signal(signal.SIGKILL)
    kept = {file.name: file.read_text() for file in finished(tmp_path)}
    assert len(kept) < len(BRANCHES), "it was killed half way"
    assert not (tmp_path / "page.html").exists()
    done = run_process(command(tmp_path), env=environ, check=True)
    files = json.loads(done.stdout)["reports"]
    assert len(set(files)) == len(BRANCHES)
    reports = [json.loads((tmp_path / file).read_text()) for file in files]
    usual = usual_settings(max_new_tokens=3)
    for file, branch in zip(files, BRANCHES, strict=True):
        assert not differences(
            tmp_path / file, name=f"{REPO}:{branch}", prompts=PROMPTS, settings=usual, samples=2
        )
        args = json.loads((tmp_path / file).read_text())["args"]
        assert (args["seed"], args["config"], args["n"]) == (42, "config/noprefix2.json", None)
    for name, text in kept.items():
        assert (tmp_path / name).read_text() == text, "those that were whole are not made again"
    replies = [[it["outputs"] for e in report["prompts"] for it in e["results"]]
               for report in reports]  # fmt: skip
    assert len({json.dumps(it) for it in replies}) == len(BRANCHES), "each answered for itself"
    page = (tmp_path / "page.html").read_text()
    assert all(f"{REPO}:{branch}" in page for branch in BRANCHES)
    stats = read_report(tmp_path / files[-1]).stats
    assert [[len(it) for it in row] for row in stats] == [[2, 2, 1]] * len(PROMPTS)
    hub.requests.clear()
    (tmp_path / "page.html").unlink()
    offline = run_process(command(tmp_path), env={**environ, "HF_HUB_OFFLINE": "1"}, check=True)
    assert json.loads(offline.stdout)["reports"] == files
    assert (tmp_path / "page.html").read_text() == page
    assert hub.requests == []


def finished(folder: Path) -> list[Path]:
    """Return the reports that are whole."""
    return [it for it in folder.glob("*_sampling_*.json") if not it.name.endswith(".stats.json")]
