"""The suite itself: what its grid holds, how it covers it, and that it fails what is wrong."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from processes import run_process
from safetensors.torch import save_file

from gptq_loader_kernels.reference import ReferenceKernel
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.conformance.cover import TIMES, pairs_of, pairwise_cover
from gptq_loader_plugin.conformance.grid import AXES, cells_of, possible_layers
from gptq_loader_plugin.conformance.layers import NAME, make_layer, store_layer
from gptq_loader_plugin.conformance.packer import write_qweight, write_qzeros
from gptq_loader_plugin.conformance.run import by_layer, run
from gptq_loader_plugin.device import Device
from gptq_loader_plugin.errors import TensorMismatch
from gptq_loader_plugin.kernel import Declined, LayerSpec, PackedLinear
from gptq_loader_plugin.kernel.packing import (
    pack_columns,
    pack_rows,
    unpack_columns,
    unpack_rows,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gptq_loader_plugin.kernel import Verdict
    from gptq_loader_plugin.kernel.packing import Layout

LAYERS = list(possible_layers())
COVER = pairwise_cover(LAYERS)
CPU = Device("cpu")
LAYOUTS: list[tuple[int, Layout]] = [
    *((bits, "continuous") for bits in (2, 3, 4, 8)),
    *((bits, "planar") for bits in (2, 3, 4, 5, 6, 7, 8)),
]


def test_the_cover_meets_every_pair_and_is_small() -> None:
    there_are: set[Any] = set()
    for layer in LAYERS:
        cells = list(cells_of(layer))
        there_are.update(*(pairs_of(it) for it in cells))
    met = Counter(pair for cell in COVER for pair in pairs_of(cell))
    assert not there_are - set(met)
    assert min(met.values()) >= TIMES
    assert len(set(COVER)) == len(COVER) <= 600
    assert all(cell.possible for cell in COVER)
    assert {value for (_, value), _ in met} | {value for _, (_, value) in met} == {
        value for values in AXES.values() for value in values
    }


def test_the_cover_is_the_same_every_time() -> None:
    assert pairwise_cover(reversed(LAYERS)) == COVER
    assert pairwise_cover(LAYERS, seed=1) != COVER


def test_names_of_cells_are_readable_and_their_own() -> None:
    names = {str(it) for layer in LAYERS for it in cells_of(layer)}
    assert len(names) == 24 * len(LAYERS)
    assert "4bit-g128-act-v1-sym-1024x336-float16:bfloat16-m17-strided" in {
        str(replace(it, scales="float16", bias=False, dtype="bfloat16", rows=17, view="strided"))
        for it in LAYERS
    }


@pytest.mark.parametrize(("bits", "layout"), LAYOUTS)
def test_the_suites_packer_agrees_with_the_loaders(bits: int, layout: Layout) -> None:
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (96, 64), dtype=np.uint8)
    words = write_qweight(codes, bits, layout)
    assert np.array_equal(words, pack_rows(codes, bits, layout))
    assert np.array_equal(unpack_rows(words, bits, layout), codes)
    qzeros = write_qzeros(codes, bits, layout, "v2")
    assert np.array_equal(qzeros, pack_columns(codes, bits, layout))
    assert np.array_equal(unpack_columns(qzeros, bits, layout, 64), codes)


def test_zeros_are_stored_as_the_writers_do() -> None:
    """Of 2, 4 and 8 bits a whole word loses one in each field, with borrow; others wrap alone."""
    zeros = np.array([[0, 5, *[4] * 30]], np.uint8)
    four = write_qzeros(zeros, 4, "continuous", "v1").view(np.uint32)
    assert hex(four[0, 0]) == "0x3333333f"  # [0, 5] is [15, 3]
    three = write_qzeros(zeros, 3, "continuous", "v1")
    assert unpack_columns(three, 3, "continuous", 4).tolist() == [[7, 4, 3, 3]]
    assert write_qzeros(zeros[:, :9], 3, "continuous", "v2").shape == (1, 0), "a partial word"


@pytest.mark.parametrize("part", range(4))
def test_layers_are_those_a_reader_finds_in_a_file(part: int, tmp_path: Path) -> None:
    """The cover's layers, written to a checkpoint, are read as the suite hands them to kernels."""
    for number, layer in enumerate({it.layer: None for it in COVER[part::4]}):
        case = layer.case
        stored = store_layer(case)
        tensors = {
            "qweight": torch.from_numpy(stored.qweight),
            "qzeros": torch.from_numpy(stored.qzeros),
            "scales": stored.scales,
            "g_idx": None if stored.g_idx is None else torch.from_numpy(stored.g_idx),
            "bias": stored.bias,
        }
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file(
            {f"{NAME}.{part}": it for part, it in tensors.items() if it is not None},
            folder / "model.safetensors",
        )
        formats = {"v1": "gptq", "v2": "gptq_p" if case.layout == "planar" else "gptq_v2"}
        config = {
            "bits": case.bits,
            "group_size": case.group_size,
            "desc_act": case.act_order or case.trivial,
            "sym": case.sym,
            "checkpoint_format": formats[case.stored_zeros],
        }
        (folder / "quantize_config.json").write_text(json.dumps(config))
        spec, packed, _ = make_layer(case)
        if not case.sym and case.columns * case.bits % 32:
            with pytest.raises(TensorMismatch, match="were never written"):
                open_checkpoint(folder)
            continue
        checkpoint = open_checkpoint(folder)
        read = replace(checkpoint.layers[NAME], model_dtype=spec.model_dtype)  # no plain weights
        assert read == spec, str(layer)
        read = checkpoint.packed(NAME)
        for part_name in ("qweight", "zeros", "scales", "g_idx"):
            assert torch.equal(getattr(read, part_name), getattr(packed, part_name)), str(layer)
        assert (read.bits, read.layout) == (packed.bits, packed.layout)
        assert (read.bias is None) == (packed.bias is None)
        checkpoint.close()


class Broken:
    """A reference kernel with a mistake in it, which the suite must find."""

    name = "broken"

    def __init__(self, change: Callable[[LayerSpec, PackedLinear], PackedLinear]) -> None:
        self.change = change

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        return replace(ReferenceKernel().consider(layer, device), kernel=self.name)

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        return ReferenceKernel().prepare(layer, self.change(layer, packed), device)


def zero_off_by_one(layer: LayerSpec, packed: PackedLinear) -> PackedLinear:
    zeros = packed.zeros.clone()
    zeros[-1, -1] += 1 if zeros[-1, -1] < 255 else -1
    return replace(packed, zeros=zeros)


def groups_in_sequence(layer: LayerSpec, packed: PackedLinear) -> PackedLinear:
    return replace(packed, g_idx=packed.g_idx.sort().values)


def zeros_of_0_borrowed(layer: LayerSpec, packed: PackedLinear) -> PackedLinear:
    return replace(packed, zeros=packed.zeros.where(packed.zeros > 0, (1 << layer.bits) - 1))


def one_code_off_by_one(layer: LayerSpec, packed: PackedLinear) -> PackedLinear:
    qweight = packed.qweight.clone()
    qweight[-1, -1] ^= 1
    return replace(packed, qweight=qweight)


def no_bias(layer: LayerSpec, packed: PackedLinear) -> PackedLinear:
    return replace(packed, bias=None)


@pytest.mark.parametrize(
    ("change", "axis", "values"),
    [
        (zero_off_by_one, "shape", set(AXES["shape"])),
        (groups_in_sequence, "order", {"act", "uneven"}),
        (zeros_of_0_borrowed, "zeros", {"v1-ends", "v2-ends"}),
        (one_code_off_by_one, "shape", set(AXES["shape"])),
        (no_bias, "bias", {True}),
    ],
    ids=lambda it: getattr(it, "__name__", ""),
)
def test_a_mistake_is_found(
    change: Callable[[LayerSpec, PackedLinear], PackedLinear], axis: str, values: set[Any]
) -> None:
    """Of cells with those values, all fail that could; of the others, none."""
    cells = [it for it in COVER if it.rows and it.dtype == "float32" and it.group != "none"]
    (report,) = run([Broken(change)], CPU, by_layer(cells, ()))
    failed = {cell for cell, _ in report.failed}
    assert failed == {str(it) for it in cells if getattr(it, axis) in values}


def test_a_kernel_that_answers_neither_is_found() -> None:
    class Raises(Broken):
        def prepare(
            self, layer: LayerSpec, packed: PackedLinear, device: Device
        ) -> torch.nn.Module:
            raise RuntimeError("out of registers")

    class SaysNothing(Broken):
        def consider(self, layer: LayerSpec, device: Device) -> Verdict:
            return Declined(self.name, "")

    class Narrows(Broken):
        def prepare(
            self, layer: LayerSpec, packed: PackedLinear, device: Device
        ) -> torch.nn.Module:
            module = ReferenceKernel().prepare(layer, packed, device)
            module.register_forward_hook(lambda module, x, y: y.to(torch.bfloat16))
            return module

    work = by_layer(COVER[:8], ())
    for kind, words in (
        (Raises, "RuntimeError: out of registers"),
        (SaysNothing, "no reason of one line"),
        (Narrows, "the answer torch.bfloat16"),
    ):
        (report,) = run([kind(lambda layer, packed: packed)], CPU, work)
        reasons = [why for _, why in report.failed]
        assert reasons
        assert all(words in why for why in reasons), reasons
        assert report.cells == 8


def test_the_command_reports_as_text_and_as_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gptq_loader_plugin.conformance", "--device", "cpu"]
    part = ["--cells", "cover", "--part", "1/20", "--kernel", "reference", "--kernel", "cpu-int4"]
    completed = run_process([*command, *part, "--json"], cwd=tmp_path, check=True)
    reference, other = json.loads(completed.stdout)
    assert reference["passed"] == reference["cells"] == other["cells"] > 10
    assert other["passed"] + sum(it["cells"] for it in other["declined"]) == other["cells"]
    assert not reference["failed"] + other["failed"]
    again = run_process([*command, *part, "--jobs", "2"], cwd=tmp_path, check=True)
    assert f"reference: {reference['cells']} cells: {reference['cells']} passed" in again.stdout
    assert all(it["words"] in again.stdout for it in other["declined"])
    wrong = run_process([*command, "--kernel", "nosuch"], cwd=tmp_path)
    assert wrong.returncode == 2
    assert "no installed plugin offers a kernel named 'nosuch'" in wrong.stderr
