"""A GPTQ checkpoint is distinguished from any other folder, without reading weights."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from altered import DATA, ONE

from gptq_loader_plugin.checkpoint.detect import detect

if TYPE_CHECKING:
    from pathlib import Path


def write(folder: Path, **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )
    return folder


@pytest.mark.parametrize("folder", sorted(DATA.glob("gptq*")), ids=lambda path: path.name)
def test_ours_are(folder: Path) -> None:
    assert detect(folder).is_gptq


def test_a_dense_model_and_a_file_and_nothing_are_not(tmp_path: Path) -> None:
    assert not detect(DATA / "base").is_gptq
    assert not detect(DATA / ONE / "model.safetensors").is_gptq
    assert not detect(tmp_path / "absent").is_gptq
    assert not detect(tmp_path).is_gptq


def test_a_config_of_2023_is_enough(tmp_path: Path) -> None:
    folder = write(tmp_path, quantize_config={"bits": 4, "group_size": 128, "desc_act": True})
    assert detect(folder).is_gptq


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "fp8", "exl3", "compressed-tensors"])
def test_another_method_is_not(tmp_path: Path, method: str) -> None:
    quantization = {"quant_method": method, "bits": 4}
    assert not detect(write(tmp_path, config={"quantization_config": quantization})).is_gptq
    assert not detect(write(tmp_path, quantize_config={"bits": 4, "quant_method": method})).is_gptq


def test_awqs_first_config_is_not(tmp_path: Path) -> None:
    awq = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    assert not detect(write(tmp_path, quant_config=awq)).is_gptq


def test_a_broken_config_is_ours_to_explain(tmp_path: Path) -> None:
    assert detect(write(tmp_path / "own", quantize_config="{")).is_gptq
    assert not detect(write(tmp_path / "any", config="{")).is_gptq


def test_it_says_what_tells(tmp_path: Path) -> None:
    assert detect(DATA / ONE).source == "quantize_config.json"
    awq = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    assert detect(write(tmp_path / "awq", config=awq)).source == "config.json"
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(DATA / ONE / "model.safetensors", bare)
    assert detect(bare).source == "tensors"
    (tmp_path / "llama-7b-4bit.pt").touch()
    assert detect(tmp_path).source == "file names"
    assert detect(tmp_path / "awq" / "nothing").source == ""


def test_without_any_config_the_tensors_say_it(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    shutil.copy(DATA / ONE / "model.safetensors", folder / "llama-7b.safetensors")
    assert detect(folder).is_gptq
    (folder / "llama-7b.safetensors").write_bytes(b"no tensors")
    assert not detect(folder).is_gptq


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-7b-4bit-128g.pt", True),
        ("gptq_model.bin", True),
        ("pytorch_model.bin", False),
        ("model-14-bits.bin", False),
    ],
)
def test_of_a_pickle_the_name_says_it(tmp_path: Path, name: str, expected: bool) -> None:
    (tmp_path / name).touch()
    assert detect(tmp_path).is_gptq is expected
