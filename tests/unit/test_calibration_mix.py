"""Calibration mixes: Open-Assistant's YAML, the model's template, and that tool's statistics."""

from __future__ import annotations

import gzip
import importlib.util
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from altered import DATA
from transformers import AutoTokenizer
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.quantize.demo import CHAT_TEMPLATE
from gptq_loader_plugin.quantize.mix import CalibrationMix, read_mix
from gptq_loader_plugin.quantize.mix_samples import Mixed, mix_samples
from gptq_loader_plugin.quantize.own_chats import render_chat

if TYPE_CHECKING:
    from pathlib import Path

BASE = DATA / "base"


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def chat(number: int, words: int = 6) -> dict[str, Any]:
    return {"messages": turns(f"Question {number}?", f"Answer {number}" + " yes" * words)}


def write_lines(file: Path, rows: list[Any]) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


def write_mix(folder: Path, text: str) -> CalibrationMix:
    (folder / "mix.yaml").write_text(text)
    return read_mix(folder / "mix.yaml")


def tokenizer() -> Any:
    found = AutoTokenizer.from_pretrained(BASE)
    found.chat_template = CHAT_TEMPLATE
    return found


def mixed(folder: Path, text: str) -> Mixed:
    return mix_samples(write_mix(folder, text), tokenizer(), progress=lambda _: None)


def numbers(text: str) -> list[int]:
    return [int(it) for it in re.findall(r"Question (\d+)\?", text)]


def test_shares_are_drawn_after_the_split_and_statistics_are_the_tools(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [chat(i) for i in range(40)])
    write_lines(tmp_path / "b.jsonl.gz", [chat(100 + i) for i in range(10)])
    found = mixed(
        tmp_path,
        "rng_seed: 7\n"
        "datasets:\n"
        "  - ours: {input_file_path: a.jsonl, fraction: 0.5, val_split: 0.25, max_val_set: 3}\n"
        "  - theirs: {input_file_path: b.jsonl.gz, size: 4, val_split: 0}\n",
    )
    train, held = numbers(found.text), numbers(found.held_out)
    assert sum(it < 40 for it in train) == 15  # of the 30 that are not held out
    assert sum(it >= 100 for it in train) == 4
    assert len(set(train)) == 19
    assert len(held) == 3
    assert not set(held) & set(train)
    assert render_chat(tokenizer(), chat(train[0])["messages"]) in found.text
    tokens = [
        len(tokenizer()(render_chat(tokenizer(), chat(it)["messages"]))["input_ids"])
        for it in train
        if it < 40
    ]
    rule = "-" * 17
    block = "\n".join([
        "## Stats for 'Subset of ours' (15 samples (50.0%))", rule,
        "  Accepted: 15/15 (100.0%)", f"  Accepted tokens: {sum(tokens)}",
        "  Skipped: 0 (0.0%)", f"  Min tokens per sample: {min(tokens)}",
        f"  Max tokens per sample: {max(tokens)}",
        f"  Avg tokens per sample: {sum(tokens) / 15}", f"{rule}\n",
    ])  # fmt: skip
    assert block in found.statistics
    assert "# Stats for calibration-train\n" in found.statistics
    assert "# Stats for calibration-val\n" in found.statistics
    assert "## Stats for 'Subset of theirs' (4 samples (40.0%))" in found.statistics
    assert "## Stats for 'total' (19 samples (100.0%))" in found.statistics


def test_the_same_seed_draws_the_same_and_another_does_not(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [chat(i) for i in range(40)])
    drawn = [
        mixed(
            tmp_path,
            f"rng_seed: {seed}\ndatasets: [{{a: {{input_file_path: a.jsonl, fraction: 0.5}}}}]",
        )
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]
    assert set(numbers(drawn[0].text)) != set(numbers(drawn[2].text))
    assert drawn[0].held_out == drawn[2].held_out, "the split has a seed of its own"


def test_short_answers_are_skipped_markup_included(tmp_path: Path) -> None:
    rows = [chat(i, words=0 if i % 2 else 30) for i in range(10)]
    write_lines(tmp_path / "a.jsonl", rows)
    found = mixed(
        tmp_path,
        "min_assistant_tokens: 40\n"
        "datasets: [{a: {input_file_path: a.jsonl, val_split: 0}}]",
    )  # fmt: skip
    whole, short = tokenizer(), chat(1, words=0)["messages"]
    answer = render_chat(whole, short)[len(render_chat(whole, short[:1])) :]
    assert "<|im_start|>" in answer
    assert len(whole(answer)["input_ids"]) < 40
    assert sorted(numbers(found.text)) == [0, 2, 4, 6, 8]
    assert "  Accepted: 5/10 (50.0%)" in found.statistics
    assert "  Skipped: 5 (50.0%)" in found.statistics
    with pytest.raises(gptq.QuantizeError, match="no sample left"):
        mixed(
            tmp_path,
            "min_assistant_tokens: 4000\n"
            "datasets: [{a: {input_file_path: a.jsonl, val_split: 0}}]",
        )  # fmt: skip


def node(role: str, text: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), **fields}


def test_trees_are_cut_into_threads_by_rank_and_language(tmp_path: Path) -> None:
    first = node(
        "prompter", "Hello?",
        node("assistant", "best", node("prompter", "And?", node("assistant", "more")), rank=0),
        node("assistant", "second", rank=1),
        node("assistant", "gone", rank=0, deleted=True),
        node("assistant", "unranked"),
        lang="en",
    )  # fmt: skip
    other = node("prompter", "Hallo?", node("assistant", "Ja."), lang="de")
    third = node("prompter", "Hola?", node("assistant", "Si."), lang="es")
    trees = [
        {"message_tree_id": str(i), "prompt": it} for i, it in enumerate((first, other, third))
    ]
    write_lines(tmp_path / "trees.jsonl", trees)
    line = "datasets: [{oasst_export: {input_file_path: trees.jsonl, val_split: 0, %s}}]"
    best = mixed(tmp_path, line % 'lang: "en,de", top_k: 1')
    long = render_chat(tokenizer(), turns("Hello?", "best", "And?", "more"))
    german = render_chat(tokenizer(), turns("Hallo?", "Ja."))
    assert sorted([long, german]) == sorted([best.text[: len(long)], best.text[len(long) :]]) or (
        best.text == german + long
    )
    every = mixed(tmp_path, line % "lang: en")
    for reply in ("best", "second", "unranked"):
        assert reply in every.text
    assert "gone" not in every.text
    assert "3 samples" in every.statistics
    with pytest.raises(gptq.OptionInvalid, match="has no sample in fr"):
        mixed(tmp_path, line % "lang: fr")


def said(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def test_texts_and_other_shapes_of_chats(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("One paragraph.\nIts end.\n\n\nAnother one.\n")
    rows = [
        turns("Question 1?", "yes"),
        {"conversations": [said("human", "Question 2?"), said("gpt", "no")]},
        {"text": "Only text."},
    ]  # fmt: skip
    write_lines(tmp_path / "rows.jsonl", rows)
    found = mixed(
        tmp_path,
        "min_assistant_tokens: 1\n"
        "datasets:\n  - prose: {input_file_path: prose.txt, val_split: 0}\n"
        "datasets_extra:\n  - rows: {input_file_path: rows.jsonl, val_split: 0}\n",
    )
    assert sorted(numbers(found.text)) == [1, 2]
    for text in ("One paragraph.\nIts end.", "Another one.", "Only text."):
        assert text in found.text
    assert found.held_out == ""
    assert "<|im_start|>assistant\nno<|im_end|>" in found.text


@pytest.mark.skipif(not importlib.util.find_spec("pyarrow"), reason="pyarrow is not installed")
def test_parquet_is_read_as_json_lines_are(tmp_path: Path) -> None:
    pyarrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    rows = [chat(i) for i in range(10)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_lines(tmp_path / "a.jsonl", rows)
    line = "datasets: [{a: {input_file_path: a.%s, fraction: 0.5}}]"
    assert mixed(tmp_path, line % "parquet") == mixed(tmp_path, line % "jsonl")
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(gptq.OptionInvalid, match="cannot be read as Parquet"):
        mixed(tmp_path, line % "parquet")


@pytest.mark.skipif(bool(importlib.util.find_spec("pyarrow")), reason="pyarrow is installed")
def test_what_reads_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(gptq.OptionInvalid, match="pip install pyarrow"):
        mixed(tmp_path, "datasets: [{a: {input_file_path: a.parquet}}]")


def test_sections_are_laid_over_the_defaults(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [chat(1)])
    (tmp_path / "mix.yaml").write_text(
        "defaults: {rng_seed: 3, min_assistant_tokens: 5, output_dir: out}\n"
        "one: {datasets: [{a: {input_file_path: a.jsonl}}], min_assistant_tokens: 6}\n"
        "two: {rng_seed: 4}\n"
    )
    with pytest.raises(gptq.OptionInvalid, match=r"several sections: one, two[\s\S]*yaml:one"):
        read_mix(tmp_path / "mix.yaml")
    found = read_mix(f"{tmp_path / 'mix.yaml'}:one")
    assert (found.rng_seed, found.min_assistant_tokens, found.unused) == (3, 6, ("output_dir",))
    assert read_mix(f"{tmp_path / 'mix.yaml'}:one,two").rng_seed == 4
    with pytest.raises(gptq.OptionInvalid, match=r"no section 'twoo'[\s\S]*did you mean two"):
        read_mix(f"{tmp_path / 'mix.yaml'}:twoo")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("datasets: [{a: {input_file_path: a.jsonl, fracton: 1}}]", "a: there is no key 'fracton'"),
        ("datasets: [{a: {input_file_path: a.jsonl, fracton: 1}}]", "did you mean fraction?"),
        ("datasets: [{a: {input_file_path: a.jsonl}}]\nmin_asistant_tokens: 1", "min_assistant_t"),
        ("datasets: [{a: {input_file_path: a.jsonl, fraction: 2}}]", "a: fraction: input should"),
        ("datasets: [{a: {input_file_path: b.jsonl}}]", r"a: there is no file .*b\.jsonl"),
        ("datasets: [dolly15k]", "dolly15k names no file, and nothing is fetched"),
        ("datasets: [{a: {input_file_path: a.jsonl}, b: 1}]", "is no data set"),
        ("datasets: []", "lists no datasets"),
        ("rng_seed: 1", "lists no datasets"),
        ("- a", "holds no keys"),
        ("datasets: [", "it is no YAML"),
    ],
)
def test_what_is_wrong_with_a_mix_is_said(text: str, words: str, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [chat(1)])
    with pytest.raises(gptq.OptionInvalid, match=words):
        write_mix(tmp_path, text)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("{", "line 1 of a.jsonl is no JSON"),
        ('{"prompt": "a"}', "a row has neither messages, .*: prompt"),
        ('{"messages": [{"role": "user"}]}', "no message with a role and a text"),
        ("", "a.jsonl has no sample"),
    ],
)
def test_what_is_wrong_with_a_data_set_is_said(rows: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(rows)
    with pytest.raises(gptq.OptionInvalid, match=words):
        mixed(tmp_path, "datasets: [{a: {input_file_path: a.jsonl}}]")


def test_more_samples_than_there_are_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [chat(i) for i in range(5)])
    with pytest.raises(gptq.OptionInvalid, match="size is 6, and it has 5 samples"):
        mixed(tmp_path, "datasets: [{a: {input_file_path: a.jsonl, size: 6, val_split: 0}}]")


def test_a_chat_without_a_template_is_said(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [chat(i) for i in range(5)])
    mix = write_mix(tmp_path, "datasets: [{a: {input_file_path: a.jsonl}}]")
    bare = tokenizer()
    bare.chat_template = None
    with pytest.raises(gptq.QuantizeError, match="does not fit the model's template"):
        mix_samples(mix, bare, progress=lambda _: None)


def test_the_command_calibrates_on_a_mix_and_measures_on_what_it_holds_out(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text(
        "\n\n".join(f"Paragraph {i} has some words in it, {i} times over." for i in range(100))
    )
    file = tmp_path / "mix.yaml"
    file.write_text(
        "output_dir: x\ndatasets: [{prose: {input_file_path: prose.txt, max_val_set: 9}}]"
    )
    out = tmp_path / "out"
    few = ["--samples", "2", "--seq-len", "32", "--effort", "fast", "--json"]
    command = ["quantize", str(BASE), str(out), *few, "--calibration", str(file)]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    assert "not used here: output_dir" in ran.stderr
    assert "## Stats for 'prose' (80 samples (100.0%))" in ran.stderr
    statistics = (out / "calibration_stats.txt").read_text()
    tokens = [int(it) for it in re.findall(r"Accepted tokens: (\d+)", statistics)]
    assert len(tokens) == 4  # the data set and the total, of both splits
    compared = json.loads(ran.stdout)["quality"]["compared"]["tokens"]
    assert 0.8 * tokens[-1] < compared < 1.3 * tokens[-1]
    refused = CliRunner().invoke(app, [*command, "--own-chats"])
    assert "--calibration and --own-chats both say" in refused.stderr
