"""What a class of transformers raises, in plain words: at a load, in a reply, while quantising."""

from __future__ import annotations

import json
import sys
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from altered import ONE
from published import publish
from served import COMPLETE, running
from tiny_configs import tiny_config
from transformers import LlamaForCausalLM, LogitsProcessor, Qwen3VLForConditionalGeneration
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

from gptq_loader_plugin.class_errors import raised_in_transformers
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.engine.paged_engine import PagedEngine
from gptq_loader_plugin.errors import QuantizeError, UnsupportedFormat
from gptq_loader_plugin.generation.batch import Batch
from gptq_loader_plugin.generation.generate import Piece
from gptq_loader_plugin.generation.options import GenerateOptions
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.loading import load, load_model
from gptq_loader_plugin.measure.perplexity import window_loss
from gptq_loader_plugin.quantize.options import QuantizeOptions
from gptq_loader_plugin.quantize.run import quantize
from gptq_loader_plugin.quantize.source import load_source

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.generation.loaded import LoadedModel

PROMPT = list(range(5, 15))
GREEDY = GenerateOptions(temperature=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish("llama", tmp_path_factory.mktemp("llama")).packed


def options() -> LoadOptions:
    return LoadOptions(backend="reference", device="cpu", dtype="float32")


def test_one_that_denoises_blocks_is_refused_by_its_class(tmp_path: Path) -> None:
    published = publish("diffusion_gemma", tmp_path)
    with pytest.raises(UnsupportedFormat, match="DiffusionGemmaForBlockDiffusion does not go on"):
        load_model(published.packed, options())


def test_what_is_raised_while_tensors_are_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its class ties what is of the tower, which a text does not need and which is not loaded."""
    published = publish("qwen3_vl", tmp_path / "published")
    tied = {"model.visual.patch_embed.proj.weigh.": "lm_head.weight"}
    monkeypatch.setattr(Qwen3VLForConditionalGeneration, "_tied_weights_keys", tied)
    (tmp_path / "tied").mkdir()
    folder = edited(published.packed, tmp_path / "tied", tie_word_embeddings=True)
    with pytest.raises(UnsupportedFormat, match="issue with your definition of") as raised:
        load_model(folder, options())
    name = "Qwen3VLForConditionalGeneration"
    assert f"{name} of transformers {transformers.__version__} fails" in raised.value.message
    assert str(folder) in raised.value.message
    assert "update transformers" in raised.value.hint


def test_what_is_raised_by_the_first_forward_pass(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "create_causal_mask", raised_there())
    with pytest.raises(UnsupportedFormat, match=r"LlamaForCausalLM of .* fails .*IndexError"):
        load_model(llama, options())


def test_a_package_that_a_class_needs_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = edited(llama, tmp_path, **tiny_config("inkling_mm_model").to_dict())
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(UnsupportedFormat, match=r"of transformers .* needs scipy") as raised:
        load_model(folder, options())
    assert raised.value.hint.startswith("install it")


def test_what_is_raised_while_its_blocks_are_quantised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load_source(publish("llama", tmp_path / "published").original)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", raised_there())
    with pytest.raises(QuantizeError, match=r"LlamaForCausalLM of .* \(IndexError"):
        quantize(
            model, tokenizer, tmp_path / "out", options=QuantizeOptions(), samples=[[1, 2, 3, 4]]
        )


def test_one_that_denoises_blocks_is_not_quantised(tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match="DiffusionGemmaForBlockDiffusion does not go on"):
        load_source(publish("diffusion_gemma", tmp_path).original)


def test_what_is_raised_by_a_prompt_after_the_load(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "create_causal_mask", raised_beyond_the_self_check())
    with load(llama, backend="reference", device="cpu", dtype="float32") as model:
        with pytest.raises(UnsupportedFormat, match=r"LlamaForCausalLM of .* fails .*IndexError"):
            list(model.stream_ids(PROMPT))
        with pytest.raises(UnsupportedFormat, match="IndexError"):
            window_loss(model, torch.tensor(PROMPT))
        batch = Batch(model)
        for _ in range(2):
            batch.add(model.begin(PROMPT))
        ended = [what for _, what in batch.step()]
        assert [type(it) for it in ended] == [UnsupportedFormat] * 2
        assert not len(batch)


@pytest.mark.parametrize("ahead", [False, True])
def test_what_is_raised_by_a_step_of_the_engine(
    ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a family whose layers the engine does not fuse."""
    published = publish("gpt_neox", tmp_path)
    monkeypatch.setenv("GPTQ_LOADER_ENGINE", "1")
    monkeypatch.setattr(PagedEngine, "runs_ahead", ahead)
    with load(published.packed, backend="reference", device="cpu", dtype="float32") as model:
        batch = Batch(model)
        for _ in range(2):
            batch.add(model.begin(PROMPT, GREEDY))
        assert [what for _, what in batch.step() if isinstance(what, Piece)]
        monkeypatch.setattr(modeling_gpt_neox, "apply_rotary_pos_emb", raised_there())
        ended = [what for _, what in batch.step() if isinstance(what, Exception)]
        assert [type(it) for it in ended] == [UnsupportedFormat] * 2
        assert not len(batch)


def test_a_command_says_what_is_raised_by_a_prompt(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "create_causal_mask", raised_beyond_the_self_check())
    command = ["generate", str(llama), "--raw", "--prompt", "Six words are enough for this"]
    result = CliRunner().invoke(app, [*command, "--backend", "reference", "--device", "cpu"])
    assert result.exit_code == 1
    assert f"error: {llama}: LlamaForCausalLM of transformers" in result.stderr
    assert "hint: update transformers" in result.stderr


@pytest.mark.parametrize("scores", [{}, {"echo": True, "logprobs": 1}], ids=["reply", "scores"])
def test_a_server_says_what_is_raised_by_a_prompt(
    scores: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "create_causal_mask", raised_beyond_the_self_check())

    def loads(target: str | Path) -> LoadedModel:
        return load(target, backend="reference", device="cpu", dtype="float32")

    with running(tmp_path, names=(ONE,), loads=loads) as server:
        answer = server.post(COMPLETE, prompt=PROMPT, **scores)
        assert answer.status_code == 503
        fault = answer.json()["error"]
        assert fault["code"] == "model_unusable"
        assert fault["message"].startswith(f"{ONE}: LlamaForCausalLM of transformers")


def test_what_a_processor_of_a_caller_raises_is_not_the_class(llama: Path) -> None:
    class Fails(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise IndexError(len(input_ids), len(scores))

    with (
        load(llama, backend="reference", device="cpu", dtype="float32") as model,
        pytest.raises(IndexError),
    ):
        list(model.stream_ids(PROMPT, processors=[Fails()]))


def test_what_our_own_code_raises_is_not_theirs(llama: Path) -> None:
    def ours(**_: object) -> None:
        raise IndexError

    model = LlamaForCausalLM(tiny_config("llama"))
    model.model.register_forward_pre_hook(lambda *_: ours())
    with pytest.raises(IndexError) as raised:
        model(input_ids=model.dummy_inputs["input_ids"])
    assert not raised_in_transformers(raised.value)


def raised_there() -> FunctionType:
    """Make a function that raises as if it stood in transformers."""

    def raised(*_: object, **__: object) -> object:
        empty: list[object] = []
        return empty[1]

    return FunctionType(raised.__code__, vars(modeling_llama))


def raised_beyond_the_self_check() -> FunctionType:
    """Make such a function that raises where other than the four tokens of a load are read."""

    def raised(*_: object, inputs_embeds: torch.Tensor, **__: object) -> object:
        only_this: list[object] = [None]
        return only_this[inputs_embeds.shape[1] - 4]

    made = FunctionType(raised.__code__, vars(modeling_llama))
    made.__kwdefaults__ = raised.__kwdefaults__
    return made


def edited(checkpoint: Path, folder: Path, **fields: object) -> Path:
    """Link a checkpoint's files under another config."""
    for file in checkpoint.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder
