"""Folders that are made to hold a program up: inspect and explain answer, in words."""

from __future__ import annotations

import json
import os
import zipfile
from typing import TYPE_CHECKING, Any

import pytest
from altered import ONE, copy, edit_json, plugins

import gptq_loader_plugin as gptq
from gptq_loader_plugin.chat.jinja_process import render_jinja
from gptq_loader_plugin.checkpoint.config import StoredConfig
from gptq_loader_plugin.checkpoint.headers import DIMENSIONS, TENSORS
from gptq_loader_plugin.checkpoint.overrides import WILDCARDS
from gptq_loader_plugin.checkpoint.pickle_limits import MAX_OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.timeout(120)  # each takes less than a second on a machine by itself
JSONS = (
    "config.json", "quantize_config.json", "tokenizer_config.json", "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json", "model.safetensors.index.json",
)  # fmt: skip
FILES = (*JSONS, "chat_template.jinja", "README.md", "generation_config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy(ONE, tmp_path / "one")


def answer(folder: Path) -> list[str]:
    """Inspect and explain; return what went wrong, in words."""
    problems = []
    for use in (gptq.inspect, gptq.explain):
        try:
            use(folder, plugins=plugins())
        except gptq.GPTQLoaderError as error:
            problems.append(error.message)
    assert all(len(problem) < 10_000 for problem in problems)
    return problems


def sparse(file: Path) -> None:
    """Two thousand million bytes that take no space."""
    file.unlink(missing_ok=True)
    with file.open("wb") as stream:
        stream.truncate(2 << 30)


def pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


def loop(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to(file.name)


def endless(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.symlink_to("/dev/zero")


def deep(file: Path) -> None:
    file.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def digits(file: Path) -> None:
    file.write_text('{"a": ' + "9" * 100_000 + "}")


@pytest.mark.parametrize("how", [sparse, pipe, loop, endless, deep, digits])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_config(how: Callable[[Path], None], name: str, folder: Path) -> None:
    how(folder / name)
    answer(folder)


def test_thousands_of_files(folder: Path) -> None:
    for i in range(3000):
        (folder / f"x{i}.json").write_text("{}")
        (folder / f"y{i}.bin").write_bytes(b"x")
        (folder / f"d{i}").mkdir()
    (folder / "again").symlink_to(".")
    assert answer(folder) == []


PATTERNS: list[dict[str, Any]] = [
    {"-:(a+)+$": {}},
    {"(.*)*x": {}},
    {"-:((m|o|d|e|l|.)*)*z": {}},
    {"-:.*.*.*.*.*.*.*.*y": {}},
    {f"+:x{i}.*": {} for i in range(WILDCARDS + 1)},
    {"(" * 5000: {}},
]


@pytest.mark.parametrize("dynamic", PATTERNS, ids=range(len(PATTERNS)))
def test_patterns_that_take_for_ever_are_refused(dynamic: dict[str, Any], folder: Path) -> None:
    edit_json(folder / "quantize_config.json", lambda it: it.update(dynamic=dynamic))
    problems = answer(folder)
    assert len(problems) == 2
    assert all("dynamic holds" in problem for problem in problems)


def test_the_patterns_that_writers_use_are_not() -> None:
    dynamic: dict[str, dict[str, Any]] = {
        r"-:.*\.(?:q|k)_proj.*": {},
        r"+:.*\.18\..*(?:gate|down).*": {"bits": 8},
        r"model\.layers\.(?:1[0-9]|2[0-9])\..*mlp\..*": {"bits": 3},
        r"+:lm_head$": {"bits": 2},
        r"-:lm_head": {},
    }
    stored = StoredConfig(dynamic=dynamic)
    assert stored.override("model.layers.1.self_attn.q_proj") is None
    assert stored.override("model.layers.18.mlp.down_proj") == {"bits": 8}
    assert stored.override("model.layers.12.mlp.down_proj") == {"bits": 3}
    assert stored.override("lm_head") == {"bits": 2}
    assert stored.override("lm_head.other") is None
    assert stored.override("model.norm") == {}


def test_a_name_for_each_of_very_many_layers_is_no_pattern(folder: Path) -> None:
    extra = {f"model.layers.{i}.mlp.up_proj": {"bits": 4} for i in range(50_000)}
    extra["model.layers.1.mlp.up_proj"] = {"bits": 16}
    (folder / "quantize_config.json").unlink()
    stored = {"quant_method": "auto-round", "bits": 4, "extra_config": extra}
    edit_json(folder / "config.json", lambda it: it.update(quantization_config=stored))
    assert answer(folder) == []


def header(folder: Path, content: bytes, data: int = 0) -> None:
    size = len(content).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(size + content + bytes(data))


@pytest.mark.parametrize("shape", ["[Infinity]", "[1e400]", "[NaN]", '"abc"', "[-1]", "[[1]]"])
def test_a_shape_that_is_none(shape: str, folder: Path) -> None:
    entry = f'{{"dtype": "I32", "shape": {shape}, "data_offsets": [0, 4]}}'
    header(folder, f'{{"a.qweight": {entry}}}'.encode(), 4)
    assert all("a.qweight" in problem for problem in answer(folder))


def test_headers_without_end(folder: Path) -> None:
    ones = [1] * (DIMENSIONS + 1)
    entry = {"dtype": "I32", "shape": ones, "data_offsets": [0, 4]}
    header(folder, json.dumps({"a.qweight": entry}).encode(), 4)
    assert "dimensions" in answer(folder)[0]
    header(folder, b'{"a":' * 1_000_000)
    assert "not JSON" in answer(folder)[0]


def test_more_tensors_than_any_model_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TENSORS > 2 * 280_000
    monkeypatch.setattr("gptq_loader_plugin.checkpoint.headers.TENSORS", 10)
    assert "more than 10 tensors" in answer(folder)[0]


def pickled(folder: Path, program: bytes) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "x-4bit.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02](" + b"K\x01" * (MAX_OPERATIONS + 1) + b"e.",
        b"\x80\x02cbuiltins\nbytearray\nq\x00J\xff\xff\xff\x7f\x85R.",
        b"\x80\x02\x8c\x08builtins\x8c\x09bytearray\x93J\xff\xff\xff\x7f\x85R.",
        bytes(1 << 27),
        b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.",  # a table that holds itself
    ],
    ids=["long", "bytes", "stack", "zip", "itself"],
)
def test_a_pickle_that_is_a_bomb(program: bytes, folder: Path) -> None:
    pickled(folder, program)
    assert len(answer(folder)) == 2


def test_a_template_is_asked_nothing_more_once_it_was_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loops)
    renders = []

    def counted(*arguments: Any, **options: Any) -> str:
        renders.append(options["seconds"])
        return render_jinja(*arguments, **options)

    monkeypatch.setattr("gptq_loader_plugin.chat.templates.render_jinja", counted)
    assert gptq.inspect(folder, plugins=plugins()).template.stop == ()
    assert len(renders) == 1
    assert renders[0] <= 2


def test_zeros_that_are_larger_than_any_layers_are_not_read(folder: Path) -> None:
    rows, columns = 1 << 14, 1 << 17
    shapes = {
        "qweight": ("I32", [rows // 8, columns], 4),
        "qzeros": ("I32", [rows, columns // 8], 4),
        "scales": ("F16", [rows, columns], 2),
    }
    entries, end = {}, 0
    for part, (dtype, shape, size) in shapes.items():
        begin, end = end, end + size * shape[0] * shape[1]
        entries[f"a.{part}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    header(folder, json.dumps(entries).encode())
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(stream.seek(0, 2) + end)
    assert all("a.qzeros" in problem for problem in answer(folder))
