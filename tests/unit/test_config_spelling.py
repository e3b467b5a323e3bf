"""A config's values are read however their writer spells them; what cannot be meant is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import ONE, copy, edit_json, edit_tensors, off_by, without_config

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.detect import detect
from gptq_loader_plugin.checkpoint.reader import GPTQReader

if TYPE_CHECKING:
    from pathlib import Path

SEVERAL_GROUPS = "gptq-4bit-128g-noact-sym"


def write_config(folder: Path, **fields: Any) -> Path:
    """Write a quantization_config into config.json alone."""
    (folder / "quantize_config.json").unlink(missing_ok=True)
    edit_json(folder / "config.json", lambda it: it.update(quantization_config=fields))
    return folder


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": "4", "group_size": "32"},
        {"bits": 4.0, "group_size": 32.0},
        {"wbits": 4, "group_size": 0},
        {"bits": 4, "desc_act": "true", "sym": "True"},
        {"bits": 4, "desc_act": 1, "sym": 1},
        {"bits": 4, "pack_dtype": "torch.int32"},
        {"bits": 4, "dynamic": False},
        {"bits": 4, "dynamic": []},
        {"bits": 4, "group_size": None, "sym": None},
        {"bits": 4, "quant_method": "gptqmodel"},
        {"bits": 4, "quant_method": "GPTQ"},
        {"bits": 4, "quant_method": "auto_gptq"},
    ],
    ids=json.dumps,
)
def test_spellings_of_the_same_config(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = write_config(copy(ONE, tmp_path / "model"), **fields)
    checkpoint = GPTQReader().open(folder)
    config = checkpoint.config
    assert (config.bits, config.group_size, config.desc_act, config.sym) == (4, 32, True, True)
    assert not checkpoint.warnings
    assert detect(folder).is_gptq
    assert off_by(folder, ONE) < 1e-6


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round", "inc", "AutoRound"])
@pytest.mark.parametrize(
    "packing",
    ["auto_round:auto_gptq", "auto_round:gptq:exllamav2", "auto_round:gptqmodel", None],
)
def test_autorounds_names_for_gptq(method: str, packing: str | None, tmp_path: Path) -> None:
    extra = {"lm_head": {"bits": 16, "data_type": "fp"}}
    fields = {"quant_method": method, "bits": 4, "group_size": 32, "extra_config": extra}
    if packing is not None:
        fields["packing_format"] = packing
    folder = write_config(copy(ONE, tmp_path / "model"), **fields)
    assert detect(folder).is_gptq
    assert off_by(folder, ONE) < 1e-6
    assert GPTQReader().open(folder).config.dynamic == {"-:lm_head$": {"bits": 16}}


@pytest.mark.parametrize("packing", ["auto_round:auto_awq", "auto_round:fp8", "auto_round:mxfp4"])
def test_what_autoround_packs_in_another_way_is_named(packing: str, tmp_path: Path) -> None:
    fields = {"quant_method": "auto-round", "packing_format": packing, "bits": 4}
    folder = write_config(copy(ONE, tmp_path / "model"), **fields)
    assert not detect(folder).is_gptq
    with pytest.raises(gptq.UnsupportedFormat, match=packing):
        GPTQReader().open(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("bits", "four"), ("bits", 9), ("bits", 4.5), ("dynamic", "all")]
)
def test_a_value_that_means_nothing_is_refused(field: str, value: object, tmp_path: Path) -> None:
    folder = write_config(copy(ONE, tmp_path / "model"), **{"bits": 4, field: value})
    with pytest.raises(gptq.ConfigInvalid, match=field):
        GPTQReader().open(folder)


@pytest.mark.parametrize("fill", [0, 1])
def test_a_g_idx_that_was_never_filled_in_is_none(fill: int, tmp_path: Path) -> None:
    folder = copy(SEVERAL_GROUPS, tmp_path / "model")
    edit_tensors(
        folder,
        lambda it: {
            name: torch.full_like(tensor, fill) if name.endswith(".g_idx") else tensor
            for name, tensor in it.items()
            if fill == 0 or not name.endswith(".g_idx") or len(tensor) > 128
        },
    )
    assert off_by(folder, SEVERAL_GROUPS) < 1e-6
    (warning,) = GPTQReader().open(folder).warnings
    assert "a g_idx that was never filled in" in warning
    without_config(folder)
    assert off_by(folder, SEVERAL_GROUPS) < 1e-6


@pytest.mark.parametrize("name", [ONE, SEVERAL_GROUPS])
def test_a_g_idx_of_int64_is_read(name: str, tmp_path: Path) -> None:
    folder = copy(name, tmp_path / "model")
    edit_tensors(
        folder,
        lambda it: {
            key: tensor.long() if key.endswith(".g_idx") else tensor for key, tensor in it.items()
        },
    )
    assert off_by(folder, name) < 1e-6


def test_an_empty_g_idx_is_none(tmp_path: Path) -> None:
    folder = copy(SEVERAL_GROUPS, tmp_path / "model")
    edit_tensors(
        folder,
        lambda it: {
            key: tensor[:0] if key.endswith(".g_idx") else tensor for key, tensor in it.items()
        },
    )
    assert off_by(folder, SEVERAL_GROUPS) < 1e-6


def test_an_int64_g_idx_beyond_all_groups_is_refused(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path / "model")
    edit_tensors(
        folder,
        lambda it: {
            key: tensor.long() + (1 << 32) if key.endswith(".g_idx") else tensor
            for key, tensor in it.items()
        },
    )
    with pytest.raises(gptq.CorruptCheckpoint, match="names group"):
        gptq.load(folder, device="cpu")
