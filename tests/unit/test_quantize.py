"""The quantiser: GPTQ as published, files as AutoGPTQ and GPTQModel write them, and resumable."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, error, plugins
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_plugin.chat.templates import ChatML
from gptq_loader_plugin.checkpoint.reader import GPTQReader
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.quantize import QuantizeOptions, quantize, quantize_model
from gptq_loader_plugin.quantize.algorithm import quantize_weight
from gptq_loader_plugin.quantize.calibration import (
    built_in_text,
    calibration_samples,
    calibration_text,
    chats_text,
)
from gptq_loader_plugin.quantize.demo import CHAT_TEMPLATE
from gptq_loader_plugin.quantize.own_chats import render_chat, write_chats
from gptq_loader_plugin.quantize.writer import left_of

if TYPE_CHECKING:
    from pathlib import Path

BASE = DATA / "base"
SMALL = {"samples": 4, "seq_len": 64}


def options(**fields: Any) -> QuantizeOptions:
    return QuantizeOptions(**{**SMALL, **fields})


def layer(rows: int = 48, columns: int = 256) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight [N, K], inputs [samples, K] that are correlated as activations are, Hessian)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) / 16
    mixing = torch.randn(columns, columns, generator=generator) / 16
    spread = torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    inputs = torch.randn(1024, columns, generator=generator) @ mixing * spread
    return weight, inputs, inputs.t() @ inputs / len(inputs)


def nearest(weight: torch.Tensor, bits: int, group_size: int) -> torch.Tensor:
    """Round to nearest, symmetric: what GPTQ must beat."""
    greatest = 2**bits - 1
    groups = weight.reshape(len(weight), -1, group_size)
    scale = 2 * groups.abs().amax(dim=2, keepdim=True) / greatest
    middle = (greatest + 1) / 2
    codes = (torch.round(groups / scale) + middle).clamp(0, greatest)
    return ((codes - middle) * scale).reshape(weight.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_keeps_outputs_better_than_rounding(bits: int) -> None:
    weight, inputs, hessian = layer()
    found = quantize_weight(weight, hessian, options(bits=bits, group_size=64))
    right = inputs @ weight.t()
    gptq_error = error(inputs @ found.dequantize().t(), right)
    assert gptq_error < 0.8 * error(inputs @ nearest(weight, bits, 64).t(), right)


def test_every_order_helps_and_act_order_alone_moves_rows_between_groups() -> None:
    weight, inputs, hessian = layer()
    right = inputs @ weight.t()
    errors = {}
    for order in ("none", "static", "group-aware", "act"):
        fields = options(bits=3, group_size=64, order=order, effort="fast")
        quantized = quantize_weight(weight, hessian, fields)
        errors[order] = error(inputs @ quantized.dequantize().t(), right)
        in_order = bool((quantized.g_idx[1:] >= quantized.g_idx[:-1]).all())
        assert in_order != (order == "act")
        assert torch.bincount(quantized.g_idx).tolist() == [64] * 4
    assert max(errors["static"], errors["group-aware"], errors["act"]) < errors["none"]


@pytest.mark.parametrize("order", ["static", "act"])
@pytest.mark.parametrize("fields", [{"bits": 2}, {"bits": 4, "sym": False}], ids=str)
def test_more_effort_loses_less(fields: dict[str, Any], order: str) -> None:
    weight, inputs, hessian = layer()
    right = inputs @ weight.t()
    errors = []
    for effort in ("fast", "standard"):
        chosen = options(group_size=48, order=order, effort=effort, **fields)
        quantized = quantize_weight(weight, hessian, chosen)
        errors.append(error(inputs @ quantized.dequantize().t(), right))
        assert quantized.loss == pytest.approx(errors[-1] ** 2, rel=0.01)
        assert int(quantized.codes.max()) < 2 ** fields["bits"]
    assert errors[1] < 0.97 * errors[0]


def test_no_scale_is_better_by_itself_than_the_fitted_ones() -> None:
    """The closed form against a search around it, for every scale of a few rows."""
    weight, _, hessian = layer(rows=4)
    quantized = quantize_weight(weight, hessian, options(bits=3, group_size=64))
    groups = quantized.g_idx.long()
    steps = (quantized.codes.double() - quantized.zeros.double()[groups]).t()

    def loss(scales: torch.Tensor) -> torch.Tensor:
        off = weight.double() - steps * scales[groups].t()
        return ((off @ hessian.double()) * off).sum(dim=1)

    fitted = quantized.scales.double()
    best = loss(fitted)
    for group in range(len(fitted)):
        for factor in (0.97, 1.03):
            moved = fitted.clone()
            moved[group] *= factor
            assert bool((loss(moved) > best).all())


def test_a_column_at_a_time_is_the_published_algorithm() -> None:
    """Against the unblocked algorithm of the paper, in float64, with the same grid."""
    weight, _, hessian = layer(rows=8, columns=192)
    found = quantize_weight(
        weight,
        hessian,
        options(bits=4, group_size=-1, order="none", effort="fast", damp_percent=0.1),
    )
    scale = found.scales.double()[0]
    middle = 8.0
    damped = hessian.double()
    damped.diagonal().add_(0.1 * damped.diagonal().mean())
    factor = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    work = weight.double().clone()
    same = 0
    for i in range(192):
        column = work[:, i]
        code = (torch.round(column / scale) + middle).clamp(0, 15)
        same += int((code == found.codes[i].double()).sum())
        off = (column - (code - middle) * scale) / factor[i, i]
        work[:, i:] -= torch.outer(off, factor[i, i:])
    assert same >= 0.999 * 192 * 8, "a tie or two may round the other way in float32"


def test_inputs_that_are_never_seen_do_no_harm() -> None:
    weight, _, hessian = layer()
    hessian[:, 3] = 0
    hessian[3] = 0
    found = quantize_weight(weight, hessian, options(group_size=64))
    assert bool(torch.isfinite(found.dequantize()).all())


def test_what_is_not_finite_is_said() -> None:
    weight, _, hessian = layer()
    hessian[0, 0] = float("nan")
    with pytest.raises(gptq.QuantizeError, match="not finite"):
        quantize_weight(weight, hessian, options())


def tiny() -> tuple[Any, Any, list[list[int]]]:
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    samples = calibration_samples(tokenizer, options(), built_in_text(), context=512)
    return model, tokenizer, samples


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 2, "group_size": 32},
        {"bits": 3, "group_size": -1},
        {"bits": 3, "group_size": 48, "sym": False},  # 48 divides neither 128 nor 192 evenly
        {"bits": 4, "group_size": 128, "order": "none"},  # 192 rows: a short last group
        {"bits": 4, "group_size": 16, "sym": False, "checkpoint_format": "gptq_v2"},
        {"bits": 4, "group_size": 64, "order": "act"},
        {"bits": 3, "group_size": 64, "order": "group-aware", "effort": "fast"},
        {"bits": 4, "group_size": 64, "true_sequential": False},
        {"bits": 8, "group_size": 128, "sym": False},
    ],
    ids=str,
)
def test_what_is_written_is_what_was_made(fields: dict[str, Any], tmp_path: Path) -> None:
    model, tokenizer, samples = tiny()
    quantize(model, tokenizer, tmp_path, options=options(**fields), samples=samples)
    ids = torch.tensor(samples[:1])
    checkpoint = GPTQReader().open(tmp_path)
    assert not checkpoint.warnings
    for name in ("bits", "group_size", "sym", "desc_act"):
        assert getattr(checkpoint.config, name) == getattr(options(**fields), name)
    with (
        gptq.load(tmp_path, device="cpu", backend="reference", plugins=plugins()) as loaded,
        torch.inference_mode(),
    ):
        assert error(loaded.model(ids).logits, model(ids).logits) < 1e-5
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)(ids).logits
        near = {2: 0.8, 3: 0.5, 4: 0.2, 8: 0.02}[fields["bits"]]
        assert error(loaded.model(ids).logits, base) < near


def test_the_files_are_those_of_autogptq_and_gptqmodel(tmp_path: Path) -> None:
    model, tokenizer, samples = tiny()
    chosen = options(bits=4, group_size=32, order="act")
    quantize(model, tokenizer, tmp_path, options=chosen, samples=samples)
    theirs = DATA / "gptq-4bit-32g-act-sym"
    ours = load_file(tmp_path / "model.safetensors")
    reference = load_file(theirs / "model.safetensors")
    assert set(ours) == set(reference)
    for name, tensor in reference.items():
        assert ours[name].shape == tensor.shape
        if not name.endswith("weight"):  # theirs keeps bfloat16
            assert ours[name].dtype == tensor.dtype
    config = json.loads((tmp_path / "quantize_config.json").read_text())
    stored = json.loads((theirs / "quantize_config.json").read_text())
    for name in ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "quant_method"):
        assert config[name] == stored[name]
    # AutoGPTQ's own fields, all of them
    for name in ("damp_percent", "static_groups", "true_sequential", "model_file_base_name"):
        assert name in config
    del config["meta"]  # for which AutoRound's loader takes it for another format
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == config


def test_a_block_tuned_as_a_whole_is_nearer_to_what_it_was(tmp_path: Path) -> None:
    samples = tiny()[2]
    ids = torch.tensor(samples)
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    errors = {}
    for effort in ("standard", "best"):
        model, tokenizer, _ = tiny()
        chosen = options(bits=2, group_size=32, effort=effort)
        quantize(model, tokenizer, tmp_path / effort, options=chosen, samples=samples)
        with torch.inference_mode():
            errors[effort] = error(model(ids).logits, base(ids).logits)
            with gptq.load(tmp_path / effort, backend="reference", plugins=plugins()) as loaded:
                assert error(loaded.model(ids).logits, model(ids).logits) < 0.02
    assert errors["best"] < 0.95 * errors["standard"]


def test_what_was_measured_is_written_beside_the_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "small"
    sizes = ["--samples", "4", "--seq-len", "64", "--group-size", "32"]
    command = ["quantize", str(BASE), str(out), *sizes, "--json"]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    answer, written = json.loads(ran.stdout), json.loads((out / "quality.json").read_text())
    assert answer["quality"] == {name: written[name] for name in ("compared", "noise_floor")}
    assert {"vllm", "sglang", "gptqmodel"} <= set(answer["engines"])
    compared, floor = written["compared"], written["noise_floor"]
    assert 0 <= floor["kl"] < compared["kl"] < 0.2
    assert floor["top1"] > compared["top1"] > 0.1
    assert len(written["layers"]) == 14
    assert 0 < min(written["layers"].values()) <= max(written["layers"].values()) < 0.05
    assert written["bytes"] == (out / "model.safetensors").stat().st_size
    card = (out / "README.md").read_text()
    assert f"{compared['kl']:.4f}" in card
    assert "# small" in card


def test_shards_are_written_with_their_index(tmp_path: Path) -> None:
    model, tokenizer, samples = tiny()
    quantize(model, tokenizer, tmp_path, options=options(shard_bytes=100_000), samples=samples)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    with gptq.load(tmp_path, device="cpu", plugins=plugins()) as loaded:
        assert loaded.plan.kernels()


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    model, tokenizer, samples = tiny()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    quantize(model, tokenizer, whole, options=options(), samples=samples)
    told: list[str] = []

    def stop(progress: gptq.Progress) -> None:
        told.append(progress.detail)
        if progress.done > 8:  # in the second of two blocks
            raise KeyboardInterrupt

    model, tokenizer, samples = tiny()
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tokenizer, parts, options=options(), samples=samples, progress=stop)
    assert not (parts / "config.json").exists(), "a folder with config.json is finished"
    model, tokenizer, samples = tiny()
    told.clear()
    quantize(
        model, tokenizer, parts, options=options(), samples=samples,
        progress=lambda it: told.append(it.detail) if it.stage == "quantize" else None,
    )  # fmt: skip
    assert told[0] == "model.layers.0", "the first block was not made again"
    assert len(told) < 14
    first = (whole / "model.safetensors").read_bytes()
    assert (parts / "model.safetensors").read_bytes() == first
    assert not list(parts.glob(".*")), "nothing is left over"


def test_a_run_with_other_options_begins_anew(tmp_path: Path) -> None:
    model, tokenizer, samples = tiny()

    def stop(progress: gptq.Progress) -> None:
        if progress.done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tokenizer, tmp_path, options=options(), samples=samples, progress=stop)
    model, tokenizer, samples = tiny()
    quantize(model, tokenizer, tmp_path, options=options(bits=3), samples=samples)
    assert GPTQReader().open(tmp_path).config.bits == 3


def test_progress_says_how_long_it_will_take(tmp_path: Path) -> None:
    told: list[gptq.Progress] = []
    quantize_model(BASE, tmp_path, options=options(), progress=told.append)
    steps = [it for it in told if it.stage == "quantize"]
    assert [it.done for it in steps] == sorted(it.done for it in steps)
    assert (steps[-1].done, steps[-1].total) == (14, 14)
    assert all(it.detail.endswith(" s left") for it in steps)


def test_calibration_is_cut_into_samples() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = "".join(f"Sentence {i} of many. " for i in range(2000))
    ids = tokenizer(text, verbose=False)["input_ids"]
    chosen = options(samples=3, seq_len=32, stride=100, offset=7)
    samples = calibration_samples(tokenizer, chosen, text, context=512)
    assert samples == [ids[7 + 100 * i : 39 + 100 * i] for i in range(3)]
    spread = calibration_samples(tokenizer, options(samples=5, seq_len=32), text, context=512)
    step = len(ids) // 5
    assert spread == [ids[step * i : step * i + 32] for i in range(5)], "over the whole text"
    short = calibration_samples(tokenizer, options(seq_len=512), text, context=48)
    assert {len(it) for it in short} == {48}


def test_calibration_that_is_too_short_is_said() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    with pytest.raises(gptq.QuantizeError, match="fewer than one sample of 64") as caught:
        calibration_samples(tokenizer, options(), "Too short.", context=512)
    assert "--seq-len" in caught.value.hint


def test_calibration_with_a_file(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(f"{json.dumps({'messages': turns})}\n\n{json.dumps(turns)}\n")
    chat = str(tokenizer.apply_chat_template(turns, tokenize=False))
    assert chats_text(chats, tokenizer) == chat * 2, "rendered by the model's own template"
    prose = tmp_path / "prose.txt"
    prose.write_text("Prose.")
    for file, expected in ((chats, chat * 2), (prose, "Prose."), (None, built_in_text())):
        found = calibration_text(None, tokenizer, options(), text=file, progress=print)  # type: ignore[arg-type]
        assert found == expected
    chats.write_text(f'{json.dumps(turns)}\n{{"text": "no chat"}}\n')
    with pytest.raises(gptq.QuantizeError, match=r"line 2 of chats\.jsonl"):
        chats_text(chats, tokenizer)


def test_calibration_on_chats_the_model_writes() -> None:
    model, tokenizer, _ = tiny()
    told: list[gptq.Progress] = []
    chats = write_chats(model, tokenizer, tokens=2000, progress=told.append)
    assert [turn["role"] for chat in chats for turn in chat] == ["user", "assistant"] * len(chats)
    text = "".join(render_chat(tokenizer, chat) for chat in chats)
    assert len(tokenizer(text)["input_ids"]) >= 2000
    asked, answered = (text.count(f"<|im_start|>{role}\n") for role in ("user", "assistant"))
    assert asked == answered >= 2
    assert text.count("<|im_end|>") == text.count("<|im_start|>"), "every turn ends"
    assert [it.done for it in told] == sorted(it.done for it in told)
    assert (told[0].done, told[-1].done) == (0, told[-1].total)
    assert len(told) > 64, "each step is told"
    state = torch.get_rng_state()
    assert write_chats(model, tokenizer, tokens=2000, progress=told.append) == chats
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are its own"


def test_a_template_is_used_and_written(tmp_path: Path) -> None:
    quantize_model(
        BASE, tmp_path / "out", options=options(), text="own", chat_template=CHAT_TEMPLATE
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    chat = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    chats = [chat[:1], chat, [{"role": "system", "content": "Be brief."}, *chat[:1]]]
    for messages in chats:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert rendered == ChatML().render(messages)


def test_a_model_without_a_template_writes_no_chats() -> None:
    model, tokenizer, _ = tiny()
    tokenizer.chat_template = None
    with pytest.raises(gptq.QuantizeError, match="no chat template") as caught:
        write_chats(model, tokenizer, tokens=2000, progress=print)
    assert "--text" in caught.value.hint


def test_the_built_in_text_is_prose() -> None:
    text = built_in_text()
    assert len(text.split()) > 50_000
    assert "**" not in text


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"bits": 5}, "bits"), ({"group_size": 0}, "group_size"), ({"damp_percent": 1.5}, "damp")],
)
def test_impossible_options_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        options(**fields)


def test_the_format_is_one_that_others_read() -> None:
    assert options().checkpoint_format == options(sym=True).checkpoint_format == "gptq"
    assert options(sym=False).checkpoint_format == "gptq_v2"
    assert options(sym=False, checkpoint_format="gptq").checkpoint_format == "gptq"


def test_a_source_that_is_no_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(gptq.QuantizeError, match="cannot be loaded") as caught:
        quantize_model(tmp_path, tmp_path / "out", options=options())
    assert "transformers" in caught.value.hint


def narrow(**fields: Any) -> tuple[Any, Any, list[list[int]]]:
    """A model of widths 96, 136 and 48, which fill words at 4 bits."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 384, "hidden_size": 96, "intermediate_size": 136, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "max_position_embeddings": 256, "bos_token_id": 380, "eos_token_id": 381,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **fields})).float().eval()
    _, tokenizer, samples = tiny()
    return model, tokenizer, samples


@pytest.mark.parametrize(("bits", "left"), [(2, 3), (3, 5), (4, 0), (8, 0)])
@pytest.mark.parametrize("group_size", [32, -1])
def test_every_width_that_fills_words_is_quantised_and_the_others_are_named(
    bits: int, left: int, group_size: int, tmp_path: Path
) -> None:
    model, tokenizer, samples = narrow()
    chosen = options(bits=bits, group_size=group_size)
    quantize(model, tokenizer, tmp_path, options=chosen, samples=samples)
    named = left_of(tmp_path)
    assert len(named) == left
    assert all("is no multiple of" in why for why in named.values())
    with gptq.load(tmp_path, device="cpu", dtype="float32", plugins=plugins()) as loaded:
        assert len(loaded.plan.choices) == 7 - left
        ids = torch.tensor([[1, 5, 9, 200]])
        with torch.inference_mode():
            assert error(loaded.model(ids).logits, model.half().float()(ids).logits) < 1e-2
    stored = json.loads((tmp_path / "quantize_config.json").read_text())
    assert len(stored.get("dynamic", {})) == left
    overrides = GPTQReader().open(tmp_path).config.dynamic
    assert set(overrides) == set(stored.get("dynamic", {}))


def test_a_router_is_named_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).float().eval()
    _, tokenizer, samples = tiny()
    quantize(model, tokenizer, tmp_path, options=options(), samples=samples)
    assert left_of(tmp_path) == {"model.layers.0.block_sparse_moe.gate": "no linear layer"}
    assert "dynamic" not in json.loads((tmp_path / "quantize_config.json").read_text())


def test_a_model_that_no_width_of_is_quantised_is_refused(tmp_path: Path) -> None:
    model, tokenizer, samples = narrow(hidden_size=104, head_dim=26, intermediate_size=60)
    with pytest.raises(gptq.QuantizeError, match=r"none of its layers.*is no multiple of 32"):
        quantize(model, tokenizer, tmp_path, options=options(bits=3), samples=samples)


def test_the_command_names_what_it_leaves_out(tmp_path: Path) -> None:
    model, tokenizer, _ = narrow()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    few = ["--samples", "2", "--seq-len", "32", "--bits", "3"]
    command = ["quantize", str(tmp_path / "model"), str(tmp_path / "out"), *few]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "not quantised: model.layers.0.self_attn.k_proj (96x48: 48 is no mul" in result.stderr
    command[2] = str(tmp_path / "again")
    result = CliRunner().invoke(app, [*command, "--json"])
    assert len(json.loads(result.stdout)["not_quantized"]) == 5
