"""Of several sets of files in a folder, the packed one is the checkpoint, and the rest is said."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, ONE, copy, edit_json, error, expected, off_by, plugins, read_tensors
from safetensors.torch import load_file, save_file

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.detect import detect
from gptq_loader_plugin.checkpoint.reader import GPTQReader
from gptq_loader_plugin.checkpoint.weight_files import find_weight_files

if TYPE_CHECKING:
    from pathlib import Path

PACKED = "llama-7b-4bit-32g"


def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    (save_file if file.suffix == ".safetensors" else torch.save)(tensors, file)


def write_index(folder: Path, where: dict[str, str], suffix: str, stem: str = "model") -> None:
    content = {"metadata": {}, "weight_map": where}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))


def write_plain(folder: Path, layout: str, suffix: str) -> None:
    """Write the model that the checkpoint was made of, as transformers saves it."""
    plain = load_file(DATA / "base" / "model.safetensors")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    if layout == "single":
        save(plain, folder / f"{stem}.{suffix}")
        return
    names = sorted(plain)
    shards = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save({name: plain[name] for name in held}, folder / file)
    if layout == "sharded with an index":
        where = {name: file for file, held in shards.items() for name in held}
        write_index(folder, where, suffix, stem)


@pytest.mark.parametrize("packed_suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("plain_suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("layout", ["single", "sharded", "sharded with an index"])
def test_the_packed_file_beside_the_model_it_was_made_of(
    layout: str, plain_suffix: str, packed_suffix: str, tmp_path: Path
) -> None:
    folder = copy(ONE, tmp_path / "model")
    (folder / "quantize_config.json").unlink()
    edit_json(folder / "config.json", lambda it: it.pop("quantization_config"))
    packed = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    save(packed, folder / f"{PACKED}.{packed_suffix}")
    write_plain(folder, layout, plain_suffix)
    assert [it.name for it in find_weight_files(folder).files] == [f"{PACKED}.{packed_suffix}"]
    assert detect(folder).is_gptq
    assert off_by(folder, ONE) < 1e-6


@pytest.mark.parametrize("name", [PACKED, f"{PACKED}.safetensors"])
def test_the_name_a_config_gives_may_have_its_suffix(name: str, tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "model")
    edit_json(folder / "quantize_config.json", lambda it: it.update(model_file_base_name=name))
    (folder / "model.safetensors").rename(folder / f"{PACKED}.safetensors")
    (folder / "other.safetensors").write_bytes(b"not read")
    assert off_by(folder, ONE) < 1e-6


@pytest.mark.parametrize("stem", ["model", "gptq_model-4bit-32g"])
def test_another_models_index_is_passed_over(stem: str, tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / f"{stem}.safetensors")
    names = sorted(load_file(DATA / "base" / "model.safetensors"))
    where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)}
    write_index(folder, where, "safetensors")
    (warning,) = GPTQReader().open(folder).warnings
    assert warning.startswith("model.safetensors.index.json names files that are not here")
    assert off_by(folder, ONE) < 1e-6


def test_an_index_some_of_whose_files_are_here_must_be_whole(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "model")
    tensors = read_tensors(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    where = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(tensors)}
    write_index(folder, where, "safetensors")
    with pytest.raises(gptq.TensorMismatch, match=r"model-00002-of-00002\.safetensors is missing"):
        GPTQReader().open(folder)


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "model")
    save_file({"extra": torch.zeros(2)}, folder / "visual.safetensors")
    (warning,) = GPTQReader().open(folder).warnings
    assert (
        warning == "visual.safetensors in the same folder is not of this checkpoint, and not read"
    )


def test_two_packed_files_are_ambiguous(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "a-4bit.safetensors")
    (folder / "b-4bit.safetensors").write_bytes((folder / "a-4bit.safetensors").read_bytes())
    with pytest.raises(gptq.AmbiguousReference, match=r"a-4bit\.safetensors, b-4bit\.safetensors"):
        GPTQReader().open(folder)


def test_both_kinds_of_file_are_one_checkpoint_of_safetensors(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "model")
    torch.save(read_tensors(folder), folder / "model-4bit.pt")
    assert [it.name for it in find_weight_files(folder).files] == ["model.safetensors"]
    ids, right = expected(ONE)
    with (
        gptq.load(folder, device="cpu", backend="reference", plugins=plugins()) as model,
        torch.inference_mode(),
    ):
        found: Any = model.model(ids).logits
        assert error(found, right) < 1e-6
