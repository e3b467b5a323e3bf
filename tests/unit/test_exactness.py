"""Any GPTQ checkpoint loads exactly, whatever its files are called, lack or claim."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from altered import (
    CPU_KERNELS,
    DATA,
    NAMES,
    ONE,
    SEQUENTIAL,
    Tensors,
    copy,
    dequantized,
    edit_json,
    edit_tensors,
    error,
    expected,
    off_by,
    plugins,
    read_tensors,
    rename_weights,
    set_field,
    without_config,
)
from safetensors.torch import save_file

import gptq_loader_plugin as gptq

if TYPE_CHECKING:
    from pathlib import Path

EXACT = 1e-5  # relative root-mean-square error of the logits, in float32


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_kernel_is_exact(name: str) -> None:
    assert off_by(DATA / name, name) <= EXACT


@pytest.mark.parametrize("name", NAMES)
def test_the_chosen_kernel_is_as_good_as_bfloat16(name: str) -> None:
    """No worse than 3e-2, and than 1.5 x what transformers in bfloat16 makes of the weights."""
    ids, right = expected(name)
    with torch.inference_mode():
        plain = error(dequantized(DATA / name, torch.bfloat16)(ids).logits, right)
    chosen = off_by(DATA / name, name, backend=None)
    assert chosen <= min(3e-2, 1.5 * plain)


def old_file_name(folder: Path) -> None:
    """As GPTQ-for-LLaMa's users named their files, with no config at all."""
    without_config(folder)
    rename_weights(folder, "llama7b-4bit-128g-act.safetensors")


def pt_flat(folder: Path) -> None:
    torch.save(read_tensors(folder), folder / "4bit.pt")
    (folder / "model.safetensors").unlink()


def pt_state_dict(folder: Path) -> None:
    torch.save({"state_dict": read_tensors(folder), "epoch": 1}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pt_model(folder: Path) -> None:
    """In the format from before torch 1.6, which cannot be mapped."""
    content = {"model": read_tensors(folder)}
    torch.save(content, folder / "model.pth", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()


def shards(folder: Path, *, index: bool) -> None:
    tensors = read_tensors(folder)
    names = sorted(tensors)
    (folder / "model.safetensors").unlink()
    table = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        part = names[i::3]  # the parts of one layer in different files
        save_file({name: tensors[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    if index:
        content = json.dumps({"metadata": {}, "weight_map": table})
        (folder / "model.safetensors.index.json").write_text(content)


def shards_with_index(folder: Path) -> None:
    shards(folder, index=True)


def shards_without_index(folder: Path) -> None:
    shards(folder, index=False)


def lying_desc_act(folder: Path) -> None:
    stored = json.loads((folder / "quantize_config.json").read_text())
    set_field(folder, desc_act=not stored["desc_act"])


def lying_sym(folder: Path) -> None:
    stored = json.loads((folder / "quantize_config.json").read_text())
    set_field(folder, sym=not stored["sym"])


def lying_format(folder: Path) -> None:
    stored = json.loads((folder / "quantize_config.json").read_text())["checkpoint_format"]
    other = "gptq" if stored == "gptq_v2" else "gptq_v2"
    set_field(folder, checkpoint_format=other, format=other)


def lying_bits_and_groups(folder: Path) -> None:
    stored = json.loads((folder / "quantize_config.json").read_text())
    set_field(folder, bits=8 if stored["bits"] == 4 else 4, group_size=1024)


def zero_biases_and_buffers(folder: Path) -> None:
    """AutoGPTQ of 2023 wrote a bias of zeros for every layer, and transformers its buffers."""

    def add(tensors: Tensors) -> None:
        for name in [it for it in tensors if it.endswith(".qweight")]:
            columns = tensors[name].shape[1]
            tensors[name.replace(".qweight", ".bias")] = torch.zeros(columns, dtype=torch.float16)
        for i in range(2):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.rand(16)

    edit_tensors(folder, add)


def no_prefix(folder: Path) -> None:
    def strip(tensors: Tensors) -> Tensors:
        return {name.removeprefix("model."): it for name, it in tensors.items()}

    edit_tensors(folder, strip)


def other_scales(folder: Path) -> None:
    def widen(tensors: Tensors) -> None:
        for name in [it for it in tensors if it.endswith(".scales")]:
            tensors[name] = tensors[name].float()

    edit_tensors(folder, widen)


@pytest.mark.parametrize(
    "alter",
    [
        without_config,
        old_file_name,
        pt_flat,
        pt_state_dict,
        pt_model,
        shards_with_index,
        shards_without_index,
        lying_desc_act,
        lying_sym,
        lying_format,
        lying_bits_and_groups,
        zero_biases_and_buffers,
        no_prefix,
        other_scales,
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_altered_files_are_read_exactly(name: str, alter: object, tmp_path: Path) -> None:
    if alter is lying_format and name.startswith("gptq_p"):
        pytest.skip("a planar file can only say it is one: its zeros lie in no other layout")
    folder = copy(name, tmp_path)
    assert callable(alter)
    alter(folder)
    assert off_by(folder, name) <= EXACT


@pytest.mark.parametrize("name", SEQUENTIAL)
@pytest.mark.parametrize("config", [True, False], ids=["config", "no-config"])
def test_without_g_idx(name: str, config: bool, tmp_path: Path) -> None:
    """GPTQ-for-LLaMa before act-order wrote none: rows lie in groups one after the other."""
    folder = copy(name, tmp_path)
    if not config:
        without_config(folder)
    edit_tensors(folder, lambda it: {n: t for n, t in it.items() if not n.endswith(".g_idx")})
    assert off_by(folder, name) <= EXACT


@pytest.mark.parametrize("backend", ["reference", "dense", *CPU_KERNELS])
def test_biases_that_are_not_zero(backend: str, tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    generator = torch.Generator().manual_seed(0)

    def add(tensors: Tensors) -> None:
        for name in [it for it in tensors if it.endswith(".qweight")]:
            bias = torch.randn(tensors[name].shape[1], generator=generator) / 4
            tensors[name.replace(".qweight", ".bias")] = bias.half()

    edit_tensors(folder, add)
    ids, plain = expected(ONE)
    edit_json(folder / "config.json", lambda it: it.update(attention_bias=True, mlp_bias=True))
    with torch.inference_mode():
        right = dequantized(folder, torch.float32)(ids).logits
        # a config that forgot the biases changes nothing
        edit_json(
            folder / "config.json", lambda it: it.update(attention_bias=False, mlp_bias=False)
        )
        with gptq.load(folder, device="cpu", backend=backend, plugins=plugins()) as model:
            found = model.model(ids).logits
    assert error(plain, right) > 0.05, "the biases matter"
    assert error(found, right) <= (EXACT if backend == "reference" else 3e-2)


def test_a_lie_is_told(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    v2 = {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}
    set_field(folder, desc_act=False, sym=False, group_size=64, **v2)
    with gptq.load(folder, device="cpu", plugins=plugins()) as model:
        warnings = " | ".join(model.warnings)
    for words in (
        "desc_act is False in quantize_config.json; the tensors say True, and they win",
        "sym is False in quantize_config.json; the tensors say True, and they win",
        "group_size is 64 in quantize_config.json; the tensors say 32, and they win",
        "the config says zeros are stored as gptq_v2 (zero); the zeros themselves are gptq",
    ):
        assert words in warnings


def test_embeddings_padded_past_the_tokenizer_are_never_sampled(tmp_path: Path) -> None:
    """vLLM and Megatron pad them to a multiple; a sampled padding id is a crash or nothing."""
    folder = copy(ONE, tmp_path)
    vocabulary = 448

    def pad(tensors: Tensors) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            old = tensors[name]
            more = old.mean(0, keepdim=True).repeat(vocabulary - old.shape[0], 1) * 50
            tensors[name] = torch.cat((old, more))

    edit_tensors(folder, pad)
    edit_json(folder / "config.json", lambda it: it.update(vocab_size=vocabulary))
    options = gptq.GenerateOptions(temperature=5, top_k=0, top_p=1, max_new_tokens=64, seed=3)
    with gptq.load(folder, device="cpu", plugins=plugins()) as model:
        known = len(model.tokenizer)
        assert known < vocabulary
        reply = model.generate("The", options)
        assert reply.tokens == 64 or reply.finish == "stop"
        ids = model.tokenizer("The", return_tensors="pt")
        whole = model.model.generate(**ids, max_new_tokens=64, do_sample=True, temperature=5.0)
        assert int(whole.max()) < known


def test_memory_mapped_weights_are_left_as_they_are(tmp_path: Path) -> None:
    folder = copy(ONE, tmp_path)
    before = (folder / "model.safetensors").read_bytes()
    for backend in ("reference", "dense", *CPU_KERNELS):
        with gptq.load(folder, device="cpu", backend=backend, plugins=plugins()) as model:
            model.generate("a", gptq.GenerateOptions(max_new_tokens=2))
    assert (folder / "model.safetensors").read_bytes() == before
