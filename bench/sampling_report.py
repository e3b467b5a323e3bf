"""Sample SmolLM2's six branches from a hub, and hold the reports to Open-Assistant's form.

    python bench/sampling_report.py [--out build/sampling] [--max-new-tokens 96] [--only PART...]

Quantises SmolLM2-135M-Instruct into the six usual branches (`--effort fast --samples 8 --seq-len
512`), puts them into a hub on loopback, and has `gptq-loader sample` answer the 20 prompts of
`prompts.jsonl` under two settings, once each. Prints what in the reports differs from the form,
each branch's means, and how long the page takes in Chromium, with pictures of it in `--out`. What
is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from branches import BRANCHES
from planted_faults import TESTS

from gptq_loader_plugin.quantize.demo_model import find_demo_model
from gptq_loader_plugin.sampling.report import Report, read_report
from gptq_loader_plugin.sampling.settings import read_prompts, read_settings

if TYPE_CHECKING:
    from playwright.sync_api import Page

sys.path.insert(0, str(TESTS))
REPO = "owner/SmolLM2-135M-Instruct-GPTQ"
PROMPTS = Path(__file__).with_name("prompts.jsonl")
SETTINGS = {
    "default": {"generate_args": {"max_new_tokens": 400, "min_new_tokens": 1}},
    "configurations": [
        {"name": "nucleus9", "generate_args": {
            "do_sample": True, "temperature": 0.8, "repetition_penalty": 1.2, "top_p": 0.9}},
        {"name": "greedy", "generate_args": {
            "do_sample": False, "temperature": 1.0, "repetition_penalty": 1.2, "num_beams": 1}},
    ],
}  # fmt: skip
COMMAND = (sys.executable, "-m", "gptq_loader_plugin")
WIDE, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


def make_branch(name: str, folder: Path) -> Path:
    """Quantise a branch, unless it is there."""
    if not (folder / name / "config.json").is_file():
        bits, group_size = BRANCHES[name]
        source = find_demo_model(progress=lambda _: None)
        subprocess.run(  # noqa: S603 - our own command
            [*COMMAND, "quantize", str(source), str(folder / name), "--bits", str(bits),
             "--group-size", str(group_size), "--act-order", "--effort", "fast", "--samples", "8",
             "--seq-len", "512"],
            check=True,
        )  # fmt: skip
    return folder / name


def sample(branches: dict[str, Path], out: Path, tokens: int) -> list[Path]:
    """Have the command answer the prompts with every branch of a hub; return the reports."""
    from hub_server import HubServer

    config = out / "two_settings.json"
    config.write_text(json.dumps(SETTINGS))
    with HubServer() as hub:
        for branch, folder in branches.items():
            hub.add(REPO, folder, branch=branch)
        done = subprocess.run(  # noqa: S603 - our own command
            [*COMMAND, "sample", *(f"{REPO}:{branch}" for branch in branches), "--prompts", PROMPTS,
             "--config", config, "--samples", "1", "--max-new-tokens", str(tokens), "--device",
             "cpu", "--out", out, "--html", out / "replies.html", "--json"],
            check=True, stdout=subprocess.PIPE, env={**os.environ, **hub.environment(out / "hf")},
        )  # fmt: skip
    return [Path(it) for it in json.loads(done.stdout)["reports"]]


def print_means(reports: list[Report]) -> None:
    """Print each branch's means by setting: the figures that the page's table has."""
    print("| branch | setting | characters | tokens | tokens/s | cut | as main |")
    print("|---|---|---|---|---|---|---|")
    for report in reports:
        for at, kind in enumerate(it.sampling_config for it in report.prompts[0].results):
            texts = [entry.results[at].outputs[0] for entry in report.prompts]
            first = [entry.results[at].outputs[0] for entry in reports[0].prompts]
            stats = [row[at][0] for row in report.stats]
            count, tokens = len(texts), sum(it.tokens for it in stats)
            cut = sum(it.finish == "length" for it in stats)
            same = sum(a == b for a, b in zip(texts, first, strict=True))
            print(f"| {report.model_name.rpartition(':')[2]} | {kind} | "
                  f"{sum(map(len, texts)) / count:.0f} | {tokens / count:.0f} | "
                  f"{tokens / sum(it.seconds for it in stats):.1f} | {cut} | {same} |")  # fmt: skip


def look(file: Path, out: Path) -> None:
    """Open the page in Chromium, time what a reader does, and take pictures."""
    from playwright.sync_api import sync_playwright

    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, size in (("wide", WIDE), ("phone", PHONE)):
            page = browser.new_page(viewport=size)
            began = time.perf_counter()
            page.goto(file.resolve().as_uri())
            page.locator("#count").wait_for()
            print(f"{name}: opened in {time.perf_counter() - began:.2f} s", flush=True)
            page.screenshot(path=out / f"{name}-closed.png")
            for words, act in (("a prompt", first_prompt), ("all prompts", all_prompts),
                               ("a search", search)):  # fmt: skip
                took = page.evaluate("performance.now()")
                act(page)
                took = page.evaluate("performance.now()") - took
                print(f"{name}: {words} in {took:.0f} ms", flush=True)
                page.screenshot(path=out / f"{name}-{words.replace(' ', '-')}.png")
            page.close()
        browser.close()


def first_prompt(page: Page) -> None:
    page.locator(".prompt > button").first.click()
    page.locator(".reply").first.wait_for()


def all_prompts(page: Page) -> None:
    page.get_by_role("button", name="Open all").click()
    page.locator(".prompt").nth(1).locator(".reply").first.wait_for()


def search(page: Page) -> None:
    page.locator("#search").fill("python")
    page.locator("#count:not(:has-text('20 of 20'))").wait_for()


def main() -> None:
    """Make what is missing, and print what was found."""
    from report_form import differences

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/sampling"))
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of branches' names")
    arguments = parser.parse_args()
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    names = [name for name in BRANCHES if any(part in name for part in arguments.only)]
    branches = {name: make_branch(name, out / "branches") for name in names}
    files = sample(branches, out, arguments.max_new_tokens)
    settings = read_settings(out / "two_settings.json", max_new_tokens=arguments.max_new_tokens)
    found = [
        f"{file.name}: {words}"
        for name, file in zip(names, files, strict=True)
        for words in differences(
            file, name=f"{REPO}:{name}", prompts=read_prompts(PROMPTS), settings=settings, samples=1
        )
    ]
    print("\n".join(found) or f"{len(files)} reports have the form, field by field")
    print_means([read_report(file) for file in files])
    look(out / "replies.html", out)


if __name__ == "__main__":
    main()
