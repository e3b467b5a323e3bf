"""A repository's branches, listed from their own files, their headers and the model card."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from altered import ALL, DATA, ONE, PLUGINS, copy, edit_json
from hub_server import GOOD_TOKEN, STRANGER, HubServer
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_extensions.gradio.views.branches_view import branches_html
from gptq_loader_plugin.catalog.branches import RepoReport, list_branches
from gptq_loader_plugin.catalog.card_table import CardRow, read_branch_name, read_card_table
from gptq_loader_plugin.catalog.exllama import UNREAD, ask_exllama
from gptq_loader_plugin.catalog.recommend import recommend
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.hub import download
from gptq_loader_plugin.hub.hub_reference import HubReference

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.catalog.branches import BranchReport

REPO = HubReference("owner/tiny-GPTQ")
FOUR, THREE = "gptq-4bit-32g-actorder_True", "gptq-3bit-128g-actorder_True"
CARD = f"""---
license: other
license_name: tiny-licence
---
# Tiny

| Branch | Bits | GS | Act Order | Damp % | GPTQ Dataset | Seq Len | Size | ExLlama | Desc |
| ------ | ---- | -- | --------- | ------ | ------------ | ------- | ---- | ------- | ---- |
| [{THREE}](https://example.org/{THREE}) | 3 | 128 | Yes | 0.1 | [wikitext](https://example.org/w) | 4096 | 26.78 GB | No | 3-bit, **with** group size 128g. |
| [main](https://example.org/main) | 4 | None | Yes | 0.1 | [wikitext](https://example.org/w) | 4096 | 35.33 GB | Yes | 4-bit, with Act Order. |

Something else.
"""  # noqa: E501 - as cards are


@pytest.fixture
def repository(hub: HubServer, tmp_path: Path) -> HubServer:
    main = copy("gptq-4bit-noneg-act-sym", tmp_path / "main")
    (main / "README.md").write_text(CARD)
    hub.add(REPO.repo, main)
    hub.add(REPO.repo, DATA / ONE, branch=FOUR)
    hub.add(REPO.repo, DATA / "gptq-3bit-128g-act-sym", branch=THREE)
    return hub


def listed(**options: Any) -> RepoReport:
    kernels = gptq.Plugins(installed=True, environ=ALL).kernels()
    given = {"device": find_device("cpu"), "kernels": kernels} | options
    return list_branches(REPO, **given)


def branch(report: RepoReport, name: str) -> BranchReport:
    return next(it for it in report.branches if it.branch == name)


def test_the_cards_table_comes_from_the_branches_and_the_card(repository: HubServer) -> None:
    report = listed()
    assert report.license == "tiny-licence"
    assert [it.branch for it in report.branches] == ["main", THREE, FOUR], "in the card's order"
    main, three, four = report.branches
    assert (main.bits, main.group_size, main.desc_act, main.damp_percent) == (4, -1, True, 0.1)
    assert (main.dataset, main.seq_len, main.desc) == ("wikitext", 4096, "4-bit, with Act Order.")
    assert main.sources["bits"] == "quantize_config.json"
    assert main.sources["dataset"] == "model card"
    assert (three.bits, three.group_size, three.desc) == (3, 128, "3-bit, with group size 128g.")
    assert three.exllama
    assert not three.exllama.compatible
    assert "3-bit" in three.exllama.reason
    assert four.exllama
    assert four.exllama.compatible
    assert four.dataset is None, "the card has no line for it"
    assert four.size_bytes == (DATA / ONE / "model.safetensors").stat().st_size
    assert {it.fit.fits for it in report.branches} == {True}


def test_exllama_is_not_answered_by_zeros_that_nobody_has_read(repository: HubServer) -> None:
    """An asymmetric branch may have any zeros, until its files are here."""
    asym = DATA / "gptq-4bit-32g-act-asym"
    repository.add(REPO.repo, asym, branch="asym")
    try:
        report = branch(listed(), "asym").exllama
        assert report
        assert (report.compatible, report.reason) == (None, UNREAD)
        here = download(replace(REPO, branch="asym"))
        kernels = gptq.Plugins(installed=True, environ=ALL).kernels()
        assert branch(listed(), "asym").exllama == ask_exllama(open_checkpoint(here), kernels)
    finally:
        del repository.repos[REPO.repo].branches["asym"]


def test_the_most_exact_branch_that_fits_is_recommended(repository: HubServer) -> None:
    advice = recommend(listed())
    assert advice.branch == FOUR, "groups of 32 before none"
    assert "4-bit, groups of 32: the most exact of the 3 that fit" in advice.reason
    assert "runs in: sglang, transformers" in advice.reason
    small = replace(find_device("cpu"), memory_bytes=300_000)
    none = recommend(listed(device=small))
    assert none.branch is None
    assert "none fits cpu; the smallest" in none.reason


def test_the_page_says_where_each_runs_and_which_to_take(repository: HubServer) -> None:
    html = branches_html(listed())
    assert "beside ours it runs in: vllm, sglang, transformers" in html
    assert f"<p class='advice'>Recommended: {FOUR}. 4-bit, groups of 32" in html


def test_the_command_chooses_for_a_gpu_that_is_not_here(repository: HubServer) -> None:
    shown = CliRunner().invoke(app, ["branches", REPO.repo, "--vram", "24", "--context", "256"])
    assert shown.exit_code == 0, shown.output
    assert f"Recommended: {FOUR}. 4-bit, groups of 32" in shown.stdout
    assert "for 256 tokens" in shown.stdout
    assert "| Runs in " in shown.stdout
    output = CliRunner().invoke(app, ["branches", REPO.repo, "--vram", "0.1", "--json"]).stdout
    assert json.loads(output)["recommendation"]["branch"] == FOUR
    assert json.loads(output)["branches"][0]["engines"][0]["engine"] == "vllm"


def test_of_the_weights_only_the_headers_are_fetched(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_loader_plugin.catalog.remote_branch.FIRST", 1000)
    file = DATA / ONE / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    hub.add(REPO.repo, DATA / ONE)
    assert listed().branches[0].bits == 4
    ranges = [it.range for it in hub.bodies("model.safetensors")]
    assert ranges == ["bytes=0-999", f"bytes=1000-{header - 1}"]
    hub.misbehave("*/model.safetensors", no_range=True)
    assert listed().branches[0].bits == 4, "where the hub knows no ranges, it is read so far"


def test_the_outline_takes_what_the_whole_checkpoint_takes(repository: HubServer) -> None:
    for it in listed().branches:
        folder = repository.repos[REPO.repo].branches[it.branch]
        plugins = gptq.Plugins(installed=True, environ=ALL)
        plan = gptq.explain(folder, device="cpu", plugins=plugins)
        assert it.fit.weight_bytes == plan.weight_bytes
        assert it.fit.context == 512, "what the model can have"
        assert it.fit.kv_bytes == (plan.kv_bytes_per_token or 0) * 512


def test_what_does_not_fit_says_why(repository: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(find_device("cpu"), memory_bytes=300_000)
    report = listed(device=small, context=100)
    assert {it.fit.fits for it in report.branches} == {False}
    assert "for 100 tokens); cpu has 300 kB, a tenth of which" in report.branches[0].fit.reason
    report = listed(device=find_device("cuda:sm86"))
    assert {it.fit.fits for it in report.branches} == {None}
    assert "how much memory cuda sm86 has is not known" in report.branches[0].fit.reason
    full = shutil._ntuple_diskusage(10**12, 10**12, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "to download, and 1 kB of disk are free" in listed().branches[0].fit.reason


def test_what_is_here_already_needs_no_disk(
    repository: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(replace(REPO, branch=THREE))
    full = shutil._ntuple_diskusage(10**12, 10**12, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    report = listed()
    assert [it.branch for it in report.branches if it.here] == [THREE]
    assert branch(report, THREE).fit.fits
    assert branch(report, FOUR).fit.fits is False


def test_other_kinds_of_branches_are_named(repository: HubServer, tmp_path: Path) -> None:
    repository.add(REPO.repo, DATA / "base", branch="dense")
    awq = copy(ONE, tmp_path / "awq")
    (awq / "quantize_config.json").unlink()
    edit_json(
        awq / "config.json", lambda it: it.update(quantization_config={"quant_method": "awq"})
    )
    repository.add(REPO.repo, awq, branch="awq")
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").touch()
    repository.add(REPO.repo, tmp_path / "card", branch="card")
    report = listed()
    assert {it.branch for it in report.branches if it.is_gptq is False} == {"dense", "awq", "card"}
    assert "the model is not quantised" in branch(report, "dense").error
    assert "says the quantisation method is awq" in branch(report, "awq").error
    assert "holds no weights" in branch(report, "card").error
    assert str(tmp_path) not in str(report)
    assert "/tmp" not in branch(report, "dense").error


def test_one_branch_that_fails_does_not_take_the_others(
    repository: HubServer, tmp_path: Path
) -> None:
    broken = copy(ONE, tmp_path / "broken")
    (broken / "quantize_config.json").write_text('{"bits": "four"}')
    repository.add(REPO.repo, broken, branch="broken")
    refused = {"status": 503, "headers": {"Retry-After": "0"}}
    repository.misbehave(f"*/revision/{FOUR}", **refused)
    three = repository.commit(REPO.repo, THREE)
    repository.misbehave(f"*/{three}/model.safetensors", flip=20)
    report = listed()
    assert branch(report, "main").bits == 4
    assert "status 503" in branch(report, FOUR).error
    assert (branch(report, FOUR).bits, branch(report, FOUR).group_size) == (4, 32)
    assert branch(report, FOUR).sources["bits"] == "branch name"
    assert branch(report, FOUR).fit.fits is None
    assert "header" in branch(report, THREE).error
    assert 'bits is "four"' in branch(report, "broken").error


def test_a_card_or_a_name_that_says_otherwise_is_warned_about(repository: HubServer) -> None:
    repository.add(REPO.repo, DATA / ONE, branch=THREE)
    assert branch(listed(), THREE).warnings == (
        "the model card says 3-bit, and it is not so",
        "the model card says groups of 128, and it is not so",
        "the branch name says 3-bit, and it is not so",
        "the branch name says groups of 128, and it is not so",
    )


@pytest.mark.parametrize(
    ("access", "token", "words"),
    [
        ("gated", "", "its owner must let you in"),
        ("gated", STRANGER, "has not been let in"),
        ("gated", GOOD_TOKEN, ""),
        ("private", GOOD_TOKEN, ""),
    ],
)
def test_a_gated_or_private_repository(
    repository: HubServer, access: Any, token: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.repos[REPO.repo].access = access
    monkeypatch.setenv("HF_TOKEN", token)
    report = listed()
    assert report.gated == (access == "gated")
    assert all(words in it.error for it in report.branches)
    assert all(words in it for it in report.warnings)
    assert branch(report, FOUR).bits == 4, "its name tells so much"
    assert branch(report, FOUR).size_bytes, "and its list of files"
    assert (branch(report, "main").bits == 4) == (not words)


def test_what_cannot_be_listed(repository: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(gptq.CheckpointNotFound, match="there is no repository owner/none"):
        list_branches(HubReference("owner/none"), device=find_device("cpu"), kernels=())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(gptq.HubError, match="HF_HUB_OFFLINE"):
        listed()


def test_a_pickle_is_not_looked_into(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "llama-4bit-128g.pt").write_bytes(b"never fetched")
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    hub.add(REPO.repo, tmp_path)
    found = listed().branches[0]
    assert (found.bits, found.group_size, found.is_gptq) == (4, 128, True)
    assert "pickle" in found.fit.reason
    assert not hub.bodies(".pt")


def test_the_command(repository: HubServer) -> None:
    repository.add(REPO.repo, DATA / "base", branch="dense")
    done = CliRunner().invoke(app, ["branches", REPO.repo, "--device", "cpu"], env=ALL)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == (f"owner/tiny-GPTQ on {repository.url} (HF_ENDPOINT), licence tiny-licence")
    rows = [[cell.strip() for cell in it.strip("|").split("|")] for it in lines if it[:1] == "|"]
    assert rows[2] == [
        "main", "4", "none", "yes", "0.1", "wikitext", "4096", "339 kB", "yes", "yes",
        "vllm, sglang, transformers, gptqmodel, exllamav2, llama.cpp, "
        "text-generation-inference", "4-bit, with Act Order.",
    ]  # fmt: skip
    assert [it[0] for it in rows[2:]] == ["main", THREE, "dense", FOUR]
    assert rows[4][-3:] == ["-", "-", "not GPTQ"]
    assert "  dense: not GPTQ: none of its" in done.stdout
    assert "; ExLlama: 3-bit; ExLlama takes 4-bit only" in done.stdout
    done = CliRunner().invoke(app, ["branches", f"{REPO}", "--json"], env=PLUGINS)
    data = json.loads(done.stdout)
    assert [it["branch"] for it in data["branches"]] == ["main"]
    assert data["branches"][0]["fit"]["fits"] is True
    assert CliRunner().invoke(app, ["branches", "tiny"], env=PLUGINS).exit_code == 1


def test_card_tables() -> None:
    assert read_card_table("no table") == {}
    assert read_card_table("| a | b |\n|--|--|\n| 1 | 2 |") == {}
    rows = read_card_table(CARD)
    assert rows["main"] == CardRow(
        "main", 4, -1, desc_act=True, damp_percent=0.1, dataset="wikitext", seq_len=4096,
        desc="4-bit, with Act Order.",
    )  # fmt: skip
    rough = "Branch | Bits | GS\n--- | :-: | --:\n`gptq-4bit\\_x` | four | 32g\n|  | 3 | 1 |\n"
    assert read_card_table(rough) == {"gptq-4bit_x": CardRow("gptq-4bit_x", group_size=32)}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gptq-4bit-32g-actorder_True", (4, 32, True)),
        ("gptq-3bit--1g-actorder_True", (3, -1, True)),
        ("gptq-8bit-128g-actorder_False", (8, 128, False)),
        ("gptq-4bit-128g", (4, 128, None)),
        ("main", (None, None, None)),
    ],
)
def test_branch_names(name: str, found: tuple[Any, ...]) -> None:
    row = read_branch_name(name)
    assert (row.bits, row.group_size, row.desc_act) == found
