"""A damaged checkpoint is one typed error with a hint: no traceback, and none of its code runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from altered import ONE, Tensors, copy, edit_json, edit_tensors, plugins, read_tensors, set_field
from processes import run_process
from safetensors.torch import save_file
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.cli.app import app

if TYPE_CHECKING:
    from collections.abc import Callable

WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.1.self_attn.q_proj"


def drop(*names: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        edit_tensors(folder, lambda it: {n: t for n, t in it.items() if n not in names})

    return edit


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        edit_tensors(folder, lambda it: it.update({name: change(it[name]).contiguous()}))

    return edit


def filled(name: str, index: tuple[int, ...], value: float) -> Callable[[Path], None]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return put(name, change)


def header(edit: Callable[[dict[str, dict[str, object]]], object]) -> Callable[[Path], None]:
    """Change what a safetensors file says of itself, and nothing else."""

    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        edit(table)
        new = json.dumps(table).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def cut(size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[:size])

    return change


def marked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())

    return change


def gguf(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-q4.gguf")


def dangling(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("nowhere")


def one_deeper(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / WEIGHTS).rename(folder / "inner" / WEIGHTS)


class Shell:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("exit 1",)


def deleted(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self._target,)


def pickle_with_code(folder: Path) -> None:
    content = read_tensors(folder) | {"bomb": Bomb(folder / "ran")}
    torch.save(content, folder / "model.pt")
    (folder / WEIGHTS).unlink()


def bare_pickle_with_code(folder: Path) -> None:
    (folder / "model.bin").write_bytes(pickle.dumps(Bomb(folder / "ran")))
    (folder / WEIGHTS).unlink()


def cut_pickle(folder: Path) -> None:
    torch.save(read_tensors(folder), folder / "model.pt")
    data = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(data[: len(data) // 2])
    (folder / WEIGHTS).unlink()


def missing_shard(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")


def index_without_its_shard(folder: Path) -> None:
    table = dict.fromkeys(read_tensors(folder), WEIGHTS)
    table["lm_head.weight"] = "model-2.safetensors"
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": table}))


def index_of_another_folder(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder.parent / "outside.safetensors")
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))


def awq(folder: Path) -> None:
    set_field(folder, quant_method="awq", method="awq")


def awq_by_its_tensors(folder: Path) -> None:
    (folder / "quantize_config.json").unlink()
    edit_json(folder / "config.json", lambda it: it.pop("quantization_config"))
    tensors = read_tensors(folder)
    # AWQ packs codes along the columns, and has no g_idx
    awq = {f"{Q_PROJ}.{it}": tensors[f"{Q_PROJ}.{it}"] for it in ("qzeros", "scales")}
    awq[f"{Q_PROJ}.qweight"] = torch.zeros(128, 16, dtype=torch.int32)
    save_file(awq, folder / WEIGHTS)


def exl2(folder: Path) -> None:
    save_file({f"{Q_PROJ}.q_weight": torch.zeros(8, 8, dtype=torch.int32)}, folder / WEIGHTS)


def unquantised(folder: Path) -> None:
    save_file({f"{Q_PROJ}.weight": torch.zeros(128, 128)}, folder / WEIGHTS)


def two_checkpoints(folder: Path) -> None:
    save_file(read_tensors(folder), folder / "other.safetensors")
    (folder / WEIGHTS).rename(folder / "one.safetensors")


def twice(folder: Path) -> None:
    tensors = read_tensors(folder)
    for i in (1, 2):
        save_file(tensors, folder / f"model-{i:05}-of-00002.safetensors")
    (folder / WEIGHTS).unlink()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3900000000\n"
DAMAGED: dict[str, tuple[Callable[[Path], None], type[gptq.GPTQLoaderError], str]] = {
    "empty folder": (emptied, gptq.CheckpointNotFound, "no .safetensors, .pt or .bin file"),
    "no weights": (deleted(WEIGHTS), gptq.CheckpointNotFound, "no .safetensors"),
    "empty file": (cut(0), gptq.CorruptCheckpoint, "only 0 bytes long"),
    "cut short": (cut(200_000), gptq.CorruptCheckpoint, "cut short"),
    "cut in the header": (cut(500), gptq.CorruptCheckpoint, "its header claims"),
    "not safetensors": (
        written(WEIGHTS, b"\x10\0\0\0\0\0\0\0 not json at all!" + bytes(64)),
        gptq.CorruptCheckpoint,
        "not JSON",
    ),
    "header of another shape": (
        header(lambda it: it[f"{Q_PROJ}.qweight"].update(shape=[16, 256])),
        gptq.CorruptCheckpoint,
        "takes 16,384",
    ),
    "header past the end": (
        header(lambda it: it[f"{Q_PROJ}.qweight"].update(data_offsets=[10**9, 10**9 + 8192])),
        gptq.CorruptCheckpoint,
        "cut short",
    ),
    "header of an unknown dtype": (
        header(lambda it: it[f"{Q_PROJ}.scales"].update(dtype="Q4")),
        gptq.CorruptCheckpoint,
        "unknown dtype Q4",
    ),
    "header without offsets": (
        header(lambda it: it[f"{Q_PROJ}.scales"].pop("data_offsets")),
        gptq.CorruptCheckpoint,
        "malformed",
    ),
    "missing shard": (missing_shard, gptq.TensorMismatch, r"of 00002 shards, \[2\] are missing"),
    "index without its shard": (
        index_without_its_shard,
        gptq.TensorMismatch,
        "model-2.safetensors is missing",
    ),
    "index of another folder": (
        index_of_another_folder,
        gptq.CorruptCheckpoint,
        "another folder",
    ),
    "index that is no index": (
        written(f"{WEIGHTS}.index.json", "[]"),
        gptq.CorruptCheckpoint,
        "not a shard index",
    ),
    "missing qweight": (drop(f"{Q_PROJ}.qweight"), gptq.TensorMismatch, "qweight is missing"),
    "missing qzeros": (drop(f"{Q_PROJ}.qzeros"), gptq.TensorMismatch, "qzeros is missing"),
    "missing scales": (drop(f"{Q_PROJ}.scales"), gptq.TensorMismatch, "scales is missing"),
    "missing layer": (
        drop(*(f"{Q_PROJ}.{it}" for it in ("qweight", "qzeros", "scales", "g_idx"))),
        gptq.TensorMismatch,
        "q_proj.weight is missing",
    ),
    "missing norm": (drop("model.norm.weight"), gptq.TensorMismatch, "norm.weight is missing"),
    "qweight in floats": (
        put(f"{Q_PROJ}.qweight", lambda it: it.float()),
        gptq.TensorMismatch,
        r"is F32 \[16, 128\]",
    ),
    "qzeros of another group size": (
        put(f"{Q_PROJ}.qzeros", lambda it: it[:2]),
        gptq.TensorMismatch,
        "do not fit each other",
    ),
    "qzeros of no width": (
        put(f"{Q_PROJ}.qzeros", lambda it: it[:, :11]),
        gptq.TensorMismatch,
        "no number of bits",
    ),
    "a layer of another size": (
        lambda folder: edit_json(
            folder / "config.json", lambda it: it.update(num_attention_heads=8)
        ),
        gptq.TensorMismatch,
        "holds a layer of 128x128; config.json makes it 128x256",
    ),
    "NaN scales": (
        filled(f"{Q_PROJ}.scales", (1, 5), float("nan")),
        gptq.CorruptCheckpoint,
        "scales holds values that are not finite",
    ),
    "infinite norm": (
        filled("model.norm.weight", (3,), float("inf")),
        gptq.CorruptCheckpoint,
        "norm.weight holds values that are not finite",
    ),
    "g_idx out of range": (
        filled(f"{Q_PROJ}.g_idx", (7,), 99),
        gptq.CorruptCheckpoint,
        "names group 99; there are 4 groups",
    ),
    "negative g_idx": (
        filled(f"{Q_PROJ}.g_idx", (7,), -1),
        gptq.CorruptCheckpoint,
        "names group -1",
    ),
    "one tensor twice": (twice, gptq.TensorMismatch, "is also in"),
    "two checkpoints": (two_checkpoints, gptq.AmbiguousReference, "several checkpoints"),
    "pickle with code": (pickle_with_code, gptq.UnsafeFile, "could run code"),
    "bare pickle with code": (bare_pickle_with_code, gptq.UnsafeFile, "could run code"),
    "pickle cut short": (cut_pickle, gptq.CorruptCheckpoint, "not a readable torch file"),
    "git-lfs pointer": (written(WEIGHTS, LFS), gptq.CorruptCheckpoint, "git-lfs pointer"),
    "AWQ": (awq, gptq.UnsupportedFormat, "method is awq, not gptq"),
    "AWQ without a config": (awq_by_its_tensors, gptq.UnsupportedFormat, "an AWQ checkpoint"),
    "EXL2": (exl2, gptq.UnsupportedFormat, "EXL2"),
    "Marlin": (
        lambda folder: set_field(folder, checkpoint_format="marlin", format="marlin"),
        gptq.UnsupportedFormat,
        "format marlin",
    ),
    "not quantised": (unquantised, gptq.UnsupportedFormat, "the model is not quantised"),
    "no config.json": (deleted("config.json"), gptq.ConfigInvalid, "no config.json"),
    "config.json cut short": (written("config.json", '{"model'), gptq.ConfigInvalid, "not JSON"),
    "config.json a list": (written("config.json", "[]"), gptq.ConfigInvalid, "not a table"),
    "no model type": (
        lambda folder: edit_json(folder / "config.json", lambda it: it.pop("model_type")),
        gptq.ConfigInvalid,
        "model_type is missing",
    ),
    "unknown model type": (
        lambda folder: edit_json(folder / "config.json", lambda it: it.update(model_type="llamo")),
        gptq.UnsupportedFormat,
        "llamo",
    ),
    "bits of nothing": (
        lambda folder: set_field(folder, bits=9),
        gptq.ConfigInvalid,
        "bits is 9",
    ),
    "bits in words": (
        lambda folder: set_field(folder, bits="four"),
        gptq.ConfigInvalid,
        'bits is "four" in quantize_config.json; it must be a whole number',
    ),
    "EXL2 with its config": (
        lambda folder: set_field(folder, quant_method="exl2", method="exl2", bits=4.25),
        gptq.UnsupportedFormat,
        "method is exl2",
    ),
    "bitsandbytes of 2022": (
        lambda folder: save_file({f"{Q_PROJ}.SCB": torch.zeros(8)}, folder / WEIGHTS),
        gptq.UnsupportedFormat,
        "bitsandbytes",
    ),
    "no tensors": (
        lambda folder: save_file({}, folder / WEIGHTS),
        gptq.UnsupportedFormat,
        "it holds no tensors",
    ),
    "GGUF": (gguf, gptq.CheckpointNotFound, "file, but GGUF ones"),
    "a link to nothing": (dangling, gptq.CheckpointNotFound, "a link to a file that is not there"),
    "one folder too high": (one_deeper, gptq.CheckpointNotFound, "its folder inner does"),
    "a config that is null": (
        written("quantize_config.json", "null"),
        gptq.ConfigInvalid,
        "holds null, not a table",
    ),
    "a byte-order mark": (
        marked("config.json"),
        gptq.ConfigInvalid,
        "config.json: begins with a byte-order mark",
    ),
    "a field that is no number": (
        lambda folder: edit_json(folder / "config.json", lambda it: it.update(hidden_size="big")),
        gptq.ConfigInvalid,
        'config.json: hidden_size is "big"',
    ),
    "a template that is no text": (
        written("chat_template.jinja", b"\xff\xfe\x00"),
        gptq.TemplateError,
        "is not UTF-8 text",
    ),
    "pickle of the classic attack": (
        lambda folder: [(folder / WEIGHTS).unlink(), torch.save(Shell(), folder / "model.pt")],
        gptq.UnsafeFile,
        "could run code",
    ),
    "no tokenizer": (
        deleted("tokenizer.json", "tokenizer_config.json"),
        gptq.CheckpointError,
        "tokenizer",
    ),
    "broken tokenizer": (
        written("tokenizer.json", "{}"),
        gptq.CheckpointError,
        "the tokenizer cannot be read",
    ),
    "broken template": (
        written("chat_template.jinja", "{% for message in messages %}{{ message.content }}"),
        gptq.TemplateError,
        "template",
    ),
    "broken generation config": (
        written("generation_config.json", "{"),
        gptq.ConfigInvalid,
        "generation_config.json: not JSON",
    ),
}


@pytest.fixture(params=DAMAGED)
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    folder = copy(ONE, tmp_path / "model")
    DAMAGED[request.param][0](folder)
    return folder, request.param


def test_it_is_one_typed_error_with_a_hint(damaged: tuple[Path, str]) -> None:
    folder, name = damaged
    _, kind, words = DAMAGED[name]
    with pytest.raises(kind, match=words) as caught:  # noqa: PT012 - templates fail when used
        model = gptq.load(folder, device="cpu", plugins=plugins())
        list(model.chat([{"role": "user", "content": "a"}]))
    assert type(caught.value) is not gptq.GPTQLoaderError
    assert len(caught.value.hint) > 10
    assert not (folder / "ran").exists()


def test_the_command_says_it_in_two_lines(damaged: tuple[Path, str]) -> None:
    folder, _ = damaged
    completed = CliRunner().invoke(
        app, ["generate", str(folder), "--prompt", "a", "--device", "cpu"]
    )
    assert completed.exit_code == 1
    assert completed.stdout == ""
    lines = [it for it in completed.stderr.splitlines() if it.startswith(("error:", "hint:"))]
    assert [it.partition(":")[0] for it in lines] == ["error", "hint"]
    assert "Traceback" not in completed.stderr
    assert "fault of gptq-loader" not in completed.stderr
    assert not (folder / "ran").exists()


def test_the_process_itself_ends_with_1(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "model")
    pickle_with_code(folder)
    command = [sys.executable, "-m", "gptq_loader_plugin", "generate", folder, "--prompt", "a"]
    completed = run_process(command)
    assert completed.returncode == 1
    assert completed.stderr.startswith(
        f"error: {folder}/model.pt: this pickle wants more than tensors"
    )
    assert "Traceback" not in completed.stderr


def test_missing_codes_are_not_mistaken_for_a_part_of_another_model(tmp_path: Path) -> None:
    def lose(tensors: Tensors) -> Tensors:
        return {n: t for n, t in tensors.items() if not n.startswith("model.layers.1.mlp")}

    folder = copy(ONE, tmp_path / "model")
    edit_tensors(folder, lose)
    with pytest.raises(gptq.TensorMismatch, match=r"layers\.1\.mlp\.gate_proj\.weight is missing"):
        gptq.load(folder, device="cpu", plugins=plugins())


def test_parts_of_other_models_are_one_warning(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "model")
    more = {"vision_tower.patch.weight": torch.zeros(4, 4), "score.weight": torch.zeros(2, 128)}
    edit_tensors(folder, lambda it: it | more)
    with gptq.load(folder, device="cpu", plugins=plugins()) as model:
        assert any("2 tensors of parts this model lacks" in it for it in model.warnings)
