"""What layers are calibrated by: what goes through the model, whichever way its class runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import error
from published import publish
from round_trip import IDS

import gptq_loader_plugin as gptq
from gptq_loader_plugin.model.linears import linear_shape
from gptq_loader_plugin.quantize import QuantizeOptions, memory, quantize
from gptq_loader_plugin.quantize.blocks import find_blocks
from gptq_loader_plugin.quantize.source import load_source
from gptq_loader_plugin.quantize.whole_decoder import decoder_blocks, runs_by_blocks
from gptq_loader_plugin.quantize.work import Work

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

SAMPLES = [IDS, IDS[::-1], IDS[5:] + IDS[:5]]
NOT_BY_BLOCKS = {
    "dory": "model.layers.",  # its blocks run several times
    "hrm_text": "model.H_module.layers.",  # and those of another list between them
    "xlm": "transformer.attentions.",  # lies between the members of another list
}


@pytest.mark.parametrize("model_type", NOT_BY_BLOCKS)
def test_layers_are_calibrated_by_forwards_of_the_model_where_blocks_are_none(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(model_type, tmp_path / "published").original
    used = quantized_with(source, tmp_path / "out", monkeypatch)
    expected = plain_hessians(load_source(source)[0], list(used))
    assert any(path.startswith(NOT_BY_BLOCKS[model_type]) for path in used)
    for path, hessian in used.items():
        assert error(hessian, expected[path]) < 1e-5, path


def test_layers_of_blocks_are_calibrated_by_what_the_quantised_ones_before_hand_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish("llama", tmp_path / "published").original
    models: list[Any] = []
    used = quantized_with(source, tmp_path / "out", monkeypatch, models)
    expected = plain_hessians(models[0], list(used))
    assert len(used) == 14
    for path, hessian in used.items():
        assert error(hessian, expected[path]) < 1e-5, path
    unquantised = plain_hessians(load_source(source)[0], list(used))
    assert error(used["model.layers.1.mlp.down_proj"], unquantised[path]) > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "zamba2", *NOT_BY_BLOCKS])
def test_how_a_model_runs_is_found_by_a_short_sample(model_type: str, tmp_path: Path) -> None:
    model, _ = load_source(publish(model_type, tmp_path).original)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    by_blocks = runs_by_blocks(model, find_blocks(model), torch.tensor([IDS[:16]]))
    assert by_blocks == (model_type not in NOT_BY_BLOCKS)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_blocks_that_fail_when_they_run_alone_are_calibrated_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish("llama", tmp_path / "published").original
    inside: list[str] = []

    def prepare(model: Any) -> None:
        model.model.register_forward_pre_hook(lambda *_: inside.append("model"))
        model.model.register_forward_hook(lambda *_: inside.clear())
        model.model.layers[0].register_forward_pre_hook(lambda *_: inside[0] and None)

    used = quantized_with(source, tmp_path / "out", monkeypatch, prepare=prepare)
    expected = plain_hessians(load_source(source)[0], list(used))
    assert len(used) == 14
    for path, hessian in used.items():
        assert error(hessian, expected[path]) < 1e-5, path


def test_an_interrupted_run_at_once_goes_on(tmp_path: Path) -> None:
    source = publish("xlm", tmp_path / "published").original
    options = QuantizeOptions(group_size=32)

    def run(out: Path, progress: Callable[[gptq.Progress], None] | None = None) -> None:
        quantize(*load_source(source), out, options=options, samples=SAMPLES, progress=progress)

    def stop(progress: gptq.Progress) -> None:
        if progress.done > 5:  # in the second of four members of its lists
            raise KeyboardInterrupt

    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop)
    steps: list[gptq.Progress] = []
    run(tmp_path / "parts", lambda it: steps.append(it) if it.stage == "quantize" else None)
    assert steps[0].detail == "transformer.attentions.0", "it was not made again"
    assert (steps[-1].done, steps[-1].total) == (12, 12)
    whole, parts = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")
    )
    assert parts == whole


def test_too_little_memory_to_calibrate_at_once_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_source(publish("xlm", tmp_path / "published").original)
    monkeypatch.setattr("gptq_loader_plugin.quantize.whole_decoder.free_memory", lambda: 100_000)
    with pytest.raises(gptq.NotEnoughMemory, match="XLMWithLMHeadModel do not run one") as raised:
        quantize(model, tokenizer, tmp_path / "out", options=QuantizeOptions(), samples=SAMPLES)
    assert raised.value.needed > raised.value.free == 100_000


def test_a_tower_that_no_text_goes_through_is_left(tmp_path: Path) -> None:
    model, _ = load_source(publish("qwen3_vl", tmp_path).original)
    paths = {it.path for it in decoder_blocks(model, torch.tensor([IDS[:16]]))}
    assert paths == {f"model.language_model.layers.{i}" for i in range(2)}


def quantized_with(
    source: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    models: list[Any] | None = None,
    prepare: Callable[[Any], None] = lambda _: None,
) -> dict[str, torch.Tensor]:
    """Quantise, and return by which Hessian each layer was."""
    used: dict[str, torch.Tensor] = {}
    quantize_linears = Work.quantize_linears

    def note(
        self: Work, modules: Mapping[str, Any], names: Sequence[str], hessian: torch.Tensor
    ) -> Any:
        used.update(dict.fromkeys(names, hessian.clone()))
        return quantize_linears(self, modules, names, hessian)

    monkeypatch.setattr(Work, "quantize_linears", note)
    # Tuning all scales together afterwards would change what the model computes.
    monkeypatch.setattr(memory, "tuning_bytes", lambda _: 0)
    model, tokenizer = load_source(source)
    prepare(model)
    quantize(model, tokenizer, out, options=QuantizeOptions(group_size=32), samples=SAMPLES)
    if models is not None:
        models.append(model)
    return used


@torch.inference_mode()
def plain_hessians(model: Any, paths: Sequence[str]) -> dict[str, torch.Tensor]:
    """Collect the mean of x xᵀ by hooks on one forward of the model."""
    inputs: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    for path in paths:
        linear = model.get_submodule(path)
        assert linear_shape(linear) is not None
        linear.register_forward_pre_hook(
            lambda _, arguments, path=path: inputs[path].append(arguments[0].flatten(0, -2))
        )
    model(input_ids=torch.tensor(SAMPLES), use_cache=False)
    joined = {path: torch.cat(seen).double() for path, seen in inputs.items()}
    return {path: (x.t() @ x / len(x)).float() for path, x in joined.items()}
