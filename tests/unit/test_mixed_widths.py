"""Widths by layer for a size: the size is met, the choice is the best, and readers follow it."""

from __future__ import annotations

import itertools
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from altered import DATA, error, plugins
from published import publish
from round_trip import IDS
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.reader import GPTQReader
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.generation.kl_divergence import kl_divergence
from gptq_loader_plugin.quantize import QuantizeOptions, quantize, quantize_model
from gptq_loader_plugin.quantize.algorithm import quantize_weight
from gptq_loader_plugin.quantize.allocation import Option, allocate
from gptq_loader_plugin.quantize.blocks import find_blocks, linears
from gptq_loader_plugin.quantize.budget import Budget
from gptq_loader_plugin.quantize.calibration import built_in_text, calibration_samples
from gptq_loader_plugin.quantize.sensitivity import sensitivity
from gptq_loader_plugin.quantize.source import load_source
from gptq_loader_plugin.quantize.widths import Width, dynamic_rules, unit_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gptq_loader_plugin.kernel import LayerSpec

BASE = DATA / "base"


def options(**fields: Any) -> QuantizeOptions:
    return QuantizeOptions(**{"samples": 4, "seq_len": 64, "effort": "fast", **fields})


def tiny() -> tuple[Any, Any, list[list[int]]]:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    samples = calibration_samples(tokenizer, options(), built_in_text(), context=512)
    return model, tokenizer, samples


def weight_bytes(folder: Path) -> int:
    return sum(it.stat().st_size for it in folder.glob("*.safetensors"))


def layers_of(folder: Path) -> list[LayerSpec]:
    return list(GPTQReader().open(folder).layers.values())


def widths_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {it.name: (it.bits, it.group_size) for it in layers_of(folder)}


def stated(config: Mapping[str, Any], name: str) -> tuple[int, int]:
    """What an engine takes a module's width for: GPTQModel's, vLLM's and SGLang's own lookup."""
    for pattern, fields in config.get("dynamic", {}).items():
        if re.match(pattern.removeprefix("+:"), name):
            return fields["bits"], fields["group_size"]
    return config["bits"], config["group_size"]


def test_an_allocation_is_the_best_of_all() -> None:
    generator = np.random.default_rng(0)
    for _ in range(40):
        units = [
            [
                Option(int(cost), float(lost))
                for cost, lost in zip(
                    generator.integers(10, 200, 4), generator.random(4), strict=True
                )
            ]
            for _ in range(5)
        ]
        least = sum(min(it.cost for it in unit) for unit in units)
        budget = least + int(generator.integers(0, 300))
        chosen = [unit[at] for unit, at in zip(units, allocate(units, budget), strict=True)]
        assert sum(it.cost for it in chosen) <= budget
        best = min(
            sum(it.error for it in every)
            for every in itertools.product(*units)
            if sum(it.cost for it in every) <= budget
        )
        assert sum(it.error for it in chosen) == pytest.approx(best)


def test_a_large_allocation_is_near_the_bound_of_its_relaxation() -> None:
    """Against Lagrange's lower bound, which no choice can be below, with costs as files have."""
    generator = np.random.default_rng(1)
    units = []
    for _ in range(128):
        size, weight = int(generator.integers(1, 40)) << 20, float(generator.lognormal(0, 2))
        units.append([Option(size * bits, weight * 4.0**-bits) for bits in (2, 3, 4, 8)])
    budget = int(3.5 * sum(unit[0].cost for unit in units) / 2)
    chosen = [unit[at] for unit, at in zip(units, allocate(units, budget), strict=True)]
    spent, lost = sum(it.cost for it in chosen), sum(it.error for it in chosen)
    assert spent <= budget
    bound = max(
        sum(min(it.error + price * it.cost for it in unit) for unit in units) - price * budget
        for price in np.logspace(-14, -4, 400)
    )
    assert bound <= lost < 1.02 * bound


@pytest.mark.parametrize("size", ["2.6bpw", "3.5bpw", "6bpw", "300kB", "0.4MB"])
def test_the_size_is_met_and_told_and_files_are_read_back(size: str, tmp_path: Path) -> None:
    told: list[str] = []
    quantize_model(BASE, tmp_path, options=options(size=size), tell=told.append)
    (line,) = told
    bits, number, unit = re.findall(r"([\d.]+)bpw, ([\d.]+) (\w+) of files", line)[0]
    actual = weight_bytes(tmp_path)
    forecast = float(number) * {"kB": 1e3, "MB": 1e6}[unit]
    assert forecast == pytest.approx(actual, rel=0.01)
    budget = Budget.parse(size)
    if budget.bits is not None:
        assert 0.97 * budget.bits < float(bits) <= budget.bits
    else:
        assert 0.97 * budget.bytes < actual <= 1.01 * budget.bytes
    found = widths_of(tmp_path)
    assert len(set(found.values())) > 1
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    del config["meta"]  # for which AutoRound's loader takes it for another format
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == config
    checkpoint = GPTQReader().open(tmp_path)
    assert not checkpoint.warnings
    for layer in checkpoint.layers.values():
        group = stated(config, layer.name)[1]
        size_of_group = layer.in_features if layer.group_size < 0 else layer.group_size
        assert stated(config, layer.name)[0] == layer.bits
        assert min(group, layer.in_features) == size_of_group
    assert config["dynamic"]


def test_what_is_loaded_is_what_was_made(tmp_path: Path) -> None:
    model, tokenizer, samples = tiny()
    quantize(model, tokenizer, tmp_path, options=options(size="3.4bpw"), samples=samples)
    ids = torch.tensor(samples[:1])
    with (
        gptq.load(tmp_path, device="cpu", backend="reference", plugins=plugins()) as loaded,
        torch.inference_mode(),
    ):
        assert error(loaded.model(ids).logits, model(ids).logits) < 1e-5
        kinds = {(it.bits, it.group_size) for it in layers_of(tmp_path)}
        for bits, _ in kinds:
            assert f"{bits}-bit" in str(loaded.explain())


def test_blocks_are_tuned_with_their_own_widths(tmp_path: Path) -> None:
    model, tokenizer, samples = tiny()
    chosen = options(size="3.4bpw", effort="best")
    quantize(model, tokenizer, tmp_path, options=chosen, samples=samples)
    ids = torch.tensor(samples[:1])
    with (
        gptq.load(tmp_path, device="cpu", backend="reference", plugins=plugins()) as loaded,
        torch.inference_mode(),
    ):
        assert error(loaded.model(ids).logits, model(ids).logits) < 0.02


def test_layers_that_engines_join_have_one_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).half().float().eval()
    _, tokenizer, samples = tiny()
    quantize(model, tokenizer, tmp_path, options=options(size="3.6bpw"), samples=samples)
    written = json.loads((tmp_path / "quantize_config.json").read_text())
    found = widths_of(tmp_path)
    assert len(set(found.values())) > 1
    for block in (0, 1):
        attention = f"model.layers.{block}.self_attn"
        joined = {found[f"{attention}.{it}_proj"] for it in "qkv"}
        assert joined == {stated(written, f"{attention}.qkv_proj")}
        experts = f"model.layers.{block}.block_sparse_moe.experts"
        of_experts = {width for name, width in found.items() if name.startswith(experts)}
        assert of_experts == {stated(written, experts)}
        inside = f"language_model.{attention}.qkv_proj"  # as engines with pictures name it
        assert stated(written, inside) == stated(written, f"{attention}.qkv_proj")
    ids = torch.tensor(samples[:1])
    with (
        gptq.load(tmp_path, device="cpu", backend="reference", plugins=plugins()) as loaded,
        torch.inference_mode(),
    ):
        assert error(loaded.model(ids).logits, model(ids).logits) < 1e-5


@pytest.mark.parametrize("model_type", ["dory", "xlm", "zamba2", "qwen3_moe"])
def test_models_that_run_otherwise_get_widths_too(model_type: str, tmp_path: Path) -> None:
    """Blocks that run several times or not one by one, one that several layers share, experts."""
    source = publish(model_type, tmp_path / "published").original
    model, tokenizer = load_source(source)
    samples, out = [IDS, IDS[::-1]], tmp_path / "out"
    quantize(model, tokenizer, out, options=options(size="4.5bpw"), samples=samples)
    config = json.loads((out / "quantize_config.json").read_text())
    found = layers_of(out)
    assert len({it.bits for it in found}) > 1
    assert all(stated(config, it.name)[0] == it.bits for it in found)
    with (
        gptq.load(out, device="cpu", backend="reference", plugins=plugins()) as loaded,
        torch.inference_mode(),
    ):
        ids = torch.tensor([IDS])
        right = model(ids, use_cache=False).logits
        assert error(loaded.model(ids, use_cache=False).logits, right) < 1e-3


def test_rules_reach_their_layers_and_no_others() -> None:
    wide, narrow = Width(8, 32), Width(2, 64)
    widths = {
        "model.layers.1.self_attn.q_proj": wide,
        "model.layers.11.self_attn.q_proj": wide,
        "model.layers.1.mlp.down_proj": narrow,
        "transformer.h.3.attn.c_attn": narrow,
        "head.proj": wide,
    }
    config = {"bits": 4, "group_size": 128, "dynamic": dynamic_rules(widths)}
    for name, width in widths.items():
        assert stated(config, name) == width
    for name in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.111.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.down_proj.lora",
        "model.layers.11.mlp.down_proj",
        "transformer.h.3.attn.c_proj",
        "another.head.proj",
    ):
        assert stated(config, name) == (4, 128)
    assert stated(config, "model.layers.11.self_attn.qkv_proj") == wide
    assert unit_of("a.layers.0.mlp.experts.7.up_proj") == "a.layers.0.mlp.experts"
    assert unit_of("a.layers.0.mlp.up_proj") == "a.layers.0.mlp.gate_up_proj"


def divergence(model: Any, base: Any, samples: list[list[int]]) -> float:
    with torch.inference_mode():
        ids = torch.tensor(samples)
        left, right = (it(ids).logits.float().log_softmax(-1) for it in (base, model))
        return float(kl_divergence(left, right).mean())


def test_the_forecast_divergence_is_that_of_each_layer() -> None:
    """Each layer quantised alone, by GPTQ itself, and the model's divergence measured."""
    base, _, samples = tiny()
    blocks = find_blocks(base, 8)
    modules = {path: it for block in blocks for path, it in linears(block).items()}
    two, four = Width(2, 32), Width(4, 32)
    forecast = sensitivity(
        base, blocks, [torch.tensor(samples)], options(), dict.fromkeys(modules, (two, four)),
        by_blocks=True, progress=lambda _: None,
    )  # fmt: skip
    measured = {}
    for path in modules:
        model = tiny()[0]
        module = model.get_submodule(path)
        inputs: list[torch.Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, x, to=inputs: to.append(x[0]))
        divergence(model, base, samples)
        handle.remove()
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        fields = options(bits=2, group_size=32)
        module.weight.data = quantize_weight(
            module.weight.detach(), x.t() @ x / len(x), fields
        ).dequantize()
        measured[path] = divergence(model, base, samples)
    ratios = torch.tensor([forecast[path][two] / measured[path] for path in modules])
    assert 0.5 < float(ratios.median()) < 2
    logs = torch.tensor([[forecast[it][two], measured[it]] for it in modules]).log()
    assert float(torch.corrcoef(logs.t())[0, 1]) > 0.9
    assert all(it[four] < 0.3 * it[two] for it in forecast.values())


def test_it_is_better_than_one_width_of_as_many_bytes(tmp_path: Path) -> None:
    base, tokenizer, samples = tiny()
    uniform, mixed = tiny()[0], tiny()[0]
    fields = options(bits=3, group_size=64)
    quantize(uniform, tokenizer, tmp_path / "uniform", options=fields, samples=samples)
    size = f"{weight_bytes(tmp_path / 'uniform') / 1000}kB"
    quantize(mixed, tokenizer, tmp_path / "mixed", options=options(size=size), samples=samples)
    assert weight_bytes(tmp_path / "mixed") <= 1.01 * weight_bytes(tmp_path / "uniform")
    assert divergence(mixed, base, samples) < 0.9 * divergence(uniform, base, samples)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("2.0bpw", r"2.0bpw is less than the model takes with all layers at 2 bits: 2.\d\dbpw"),
        ("10 kB", r"10 kB is less than .* kB of files"),
        ("9.5bpw", r"9.5bpw is more than the model takes with all layers at 8 bits: 9.\d\dbpw"),
        ("1GB", r"1GB is more than"),
    ],
)
def test_a_size_that_cannot_be_is_refused(size: str, words: str, tmp_path: Path) -> None:
    model, tokenizer, samples = tiny()
    with pytest.raises(gptq.QuantizeError, match=words):
        quantize(model, tokenizer, tmp_path, options=options(size=size), samples=samples)


def test_an_interrupted_run_keeps_the_widths(tmp_path: Path) -> None:
    stages: list[str] = []

    def stop(progress: gptq.Progress) -> None:
        if progress.stage == "quantize":
            raise KeyboardInterrupt

    model, tokenizer, samples = tiny()
    chosen = options(size="3.4bpw")
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tokenizer, tmp_path, options=chosen, samples=samples, progress=stop)
    model, tokenizer, samples = tiny()
    quantize(
        model, tokenizer, tmp_path, options=chosen, samples=samples,
        progress=lambda it: stages.append(it.stage),
    )  # fmt: skip
    assert "quantize" in stages
    assert not {"weigh layers", "gradients"}.intersection(stages), "nothing is weighed again"
    assert len(set(widths_of(tmp_path).values())) > 1


def test_the_command_takes_a_size(tmp_path: Path) -> None:
    out = tmp_path / "out"
    few = ["--samples", "2", "--seq-len", "32", "--effort", "fast", "--size", "5.2bpw"]
    command = ["quantize", str(BASE), str(out), *few, "--widths", "4,8"]
    ran = CliRunner().invoke(app, [*command, "--json"])
    assert ran.exit_code == 0, ran.output
    answer = json.loads(ran.stdout)
    assert {bits for bits, _ in answer["layer_widths"].values()} == {4, 8}
    assert answer["bytes"] == weight_bytes(out)
    assert {"vllm", "sglang", "gptqmodel"} <= set(answer["engines"])
    assert "it will take 5." in ran.stderr
    assert "4, 8: by layer, for 5.2bpw" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "large"], "'large' is no size"),
        (["--size", "3bpw", "--bits", "4"], "--size chooses bits"),
        (["--size", "3bpw", "--group-size", "32"], "--size chooses bits"),
        (["--size", "3bpw", "--widths", "3,5"], "widths: input should be 2, 3, 4 or 8"),
    ],
    ids=str,
)
def test_the_command_refuses(arguments: list[str], words: str, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["quantize", str(BASE), str(tmp_path / "out"), *arguments])
    assert ran.exit_code == 1
    assert words in ran.stderr
    assert not (tmp_path / "out").exists()
