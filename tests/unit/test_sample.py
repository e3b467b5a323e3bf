"""Sampling reports: the fields Open-Assistant's have, replies that repeat, runs that go on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import altered
import pytest
from report_form import differences
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.sampling.report import read_report, report_name
from gptq_loader_plugin.sampling.run import sample_replies
from gptq_loader_plugin.sampling.settings import read_prompts, read_settings, usual_settings
from gptq_loader_plugin.sampling.viewer import viewer_page

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gptq_loader_plugin.generation.loaded import LoadedModel

PROMPTS = ["What is <b>this</b>? </script>", "And that?"]
# Of each of the usual settings, in the order of the file that was published.
EACH = {"max_new_tokens": 400, "min_new_tokens": 1}
USUAL = {
    "nucleus9": EACH | {"do_sample": True, "temperature": 0.8, "repetition_penalty": 1.2,
                        "top_p": 0.9},
    "k50": EACH | {"do_sample": True, "temperature": 1.0, "repetition_penalty": 1.2, "top_k": 50,
                   "top_p": 0.95},
    "greedy": EACH | {"do_sample": False, "temperature": 1.0, "repetition_penalty": 1.2,
                      "num_beams": 1},
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    folder = altered.DATA / "gptq-4bit-32g-act-sym"
    with gptq.load(folder, device="cpu", plugins=altered.plugins(), check=False) as loaded:
        yield loaded


def run(model: LoadedModel, file: Path, **options: Any) -> Any:
    settings = options.pop("settings", usual_settings(max_new_tokens=4))
    return sample_replies(model, PROMPTS, settings, file, name="tiny", args={}, **options)


def test_a_report_has_the_fields_of_open_assistants(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl.gz"
    prompts.write_bytes(gzip.compress("\n".join(map(json.dumps, PROMPTS)).encode()))
    source = str(altered.DATA / "gptq-4bit-32g-act-sym")
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, [
        "sample", source, "--prompts", str(prompts), "--out", str(tmp_path), "--html", str(page),
        "--max-new-tokens", "3", "--device", "cpu", "--no-check", "--json",
    ])  # fmt: skip
    assert done.exit_code == 0, done.stderr
    [file] = json.loads(done.stdout)["reports"]
    usual = usual_settings(max_new_tokens=3)
    assert not differences(Path(file), name=source, prompts=PROMPTS, settings=usual, samples=2)
    assert page.read_text().count("</script>") == 2


def test_the_same_seed_writes_the_same(model: LoadedModel, tmp_path: Path) -> None:
    first = run(model, tmp_path / "a.json")
    again = run(model, tmp_path / "b.json")
    other = run(model, tmp_path / "c.json", seed=7)
    assert first.prompts == again.prompts
    assert first.prompts != other.prompts
    greedy = [it.results[2].outputs for it in first.prompts]
    assert greedy == [it.results[2].outputs for it in other.prompts]
    read = read_report(tmp_path / "a.json")
    assert read.prompts == first.prompts
    assert [it.tokens for it in read.stats[0][0]] == [it.tokens for it in first.stats[0][0]]


def test_an_interrupted_run_goes_on(model: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    whole = run(model, tmp_path / "whole.json")
    seen: list[int] = []

    def stop(progress: gptq.Progress) -> None:
        seen.append(progress.done)
        if progress.done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        run(model, file, progress=stop)
    [note] = stopped.value.__notes__
    assert note.startswith("the replies to 1 of 2 prompts are kept; run the same command again")
    assert not file.exists()
    assert max(seen) == 6
    seen.clear()
    went_on = run(model, file, progress=lambda it: seen.append(it.done))
    assert min(seen) == 5  # the first prompt's replies are those of before
    assert went_on.prompts == whole.prompts
    assert sorted(it.name for it in tmp_path.iterdir() if "report" in it.name) == [
        "report.json", "report.stats.json",
    ]  # fmt: skip


def test_a_whole_report_is_not_made_again(model: LoadedModel, tmp_path: Path) -> None:
    """Unless something is asked otherwise, which its arguments need not show."""
    file = tmp_path / "report.json"
    whole = run(model, file)
    seen: list[int] = []
    again = run(model, file, progress=lambda it: seen.append(it.done))
    assert seen == [10]
    assert (again.date, again.prompts) == (whole.date, whole.prompts)
    shorter = run(model, file, settings=usual_settings(max_new_tokens=2))
    assert [it.tokens for it in shorter.stats[0][0]] == [2, 2]
    asked = run(model, file, system="Be brief.", progress=lambda it: seen.append(it.done))
    assert min(seen[1:]) == 0
    assert asked.prompts != whole.prompts


def test_the_usual_settings_are_open_assistants() -> None:
    found = [(it.name, list(it.params.items())) for it in usual_settings()]
    assert found == [(name, list(params.items())) for name, params in USUAL.items()]


def test_settings_are_read_and_merged(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    file.write_text(json.dumps({
        "default": {"generate_args": {"max_new_tokens": 9, "top_p": 0.5}, "pre_text": system},
        "configurations": [{"name": "one", "generate_args": {"do_sample": True, "top_p": 0.9}}],
    }))  # fmt: skip
    [setting] = read_settings(file)
    assert setting.params == {"max_new_tokens": 9, "top_p": 0.9, "do_sample": True}
    assert setting.system == "Be brief."
    options = setting.options(3)
    assert (options.temperature, options.top_p, options.top_k, options.seed) == (1.0, 0.9, 0, 3)
    assert [it.options(0).temperature for it in usual_settings()] == [0.8, 1.0, 0.0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "no file of sampling settings"),
        ('{"configurations": []}', "has no settings"),
        ('{"configurations": [{"name": "a", "generate_args": {"num_beams": 4}}]}', "beams"),
        ('{"configurations": [{"name": "a", "generate_args": {"typical_p": 0.9}}]}', "typical_p"),
    ],
)
def test_settings_that_mean_nothing_here_are_refused(
    content: str, words: str, tmp_path: Path
) -> None:
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(OptionInvalid, match=words):
        read_settings(file)


def test_prompts_are_lines(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text('"one"\n\ntwo\n')
    assert read_prompts(text) == ['"one"', "two"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"one"\n{"text": "two"}\n"three"\n')
    assert read_prompts(lines, limit=2) == ["one", "two"]
    lines.write_text("one\n")
    with pytest.raises(OptionInvalid, match="no JSON"):
        read_prompts(lines)


def test_a_name_is_open_assistants() -> None:
    name = report_name("OpenAssistant/llama2-70b-oasst-sft-v10", None, day="2023-08-22")
    assert name == "2023-08-22_OpenAssistant_llama2_70b_oasst_sft_v10_sampling_noprefix2.json"


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text('{"model_name": "a"}')
    with pytest.raises(OptionInvalid, match="no sampling report"):
        read_report(file)
    assert "<script" in viewer_page([])
