"""transformers' own from_pretrained loads GPTQ checkpoints through us, exactly, and undoes it."""

from __future__ import annotations

import copy
import json
import pickle
import re
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from altered import (
    DATA,
    NAMES,
    ONE,
    SEQUENTIAL,
    edit_json,
    edit_tensors,
    error,
    expected,
    only_quantize_config,
    rename_weights,
    set_field,
    without_config,
)
from altered import copy as copy_of
from safetensors.torch import load_file, save_file
from test_architectures import BASE, MODELS, OPTIONS, samples, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
    pipeline,
)
from waiting import join

import gptq_loader_plugin as gptq
from gptq_loader_extensions import transformers as host
from gptq_loader_plugin.quantize import quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PLUGINS = gptq.Plugins(host)
CLASSES = (PreTrainedModel, AutoModel, AutoModelForCausalLM)
FLOAT32 = 1e-4  # relative error of float32 logits: the CPU kernel sums in another order
PROMPT = "<s>The old house on the hill"
HALF = "\ufffd"  # a character cut short at the end, which we leave out


@pytest.fixture
def enabled() -> Iterator[None]:
    gptq.enable_transformers(plugins=PLUGINS)
    yield
    gptq.disable_transformers(plugins=PLUGINS)


def methods() -> list[object]:
    return [vars(owner)["from_pretrained"] for owner in CLASSES]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output: torch.Tensor = model(ids).logits
    return output


def off_by(folder: Path, name: str, **options: Any) -> float:
    ids, right = expected(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    return error(logits(model, ids), right)


def test_it_is_undone_exactly() -> None:
    before = methods()
    gptq.enable_transformers(plugins=PLUGINS)
    once = methods()
    gptq.enable_transformers(plugins=PLUGINS)
    assert methods() == once
    assert not set(map(id, once)) & set(map(id, before))
    gptq.disable_transformers(plugins=PLUGINS)
    assert all(one is other for one, other in zip(methods(), before, strict=True))
    gptq.disable_transformers(plugins=PLUGINS)
    assert all(one is other for one, other in zip(methods(), before, strict=True))


def test_the_hosts_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (DATA.parents[2] / "docs" / "hosts" / "transformers.md").read_text()
    before = methods()
    for code in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        here = re.sub(r'"TheBloke/[^"]*"', repr(str(DATA / ONE)), code)
        exec(here.replace("able_transformers()", "able_transformers(plugins=P)"), {"P": PLUGINS})
    assert "kernels cpu" in capsys.readouterr().out
    assert methods() == before


def test_it_has_no_options() -> None:
    with pytest.raises(gptq.OptionInvalid, match="no option colour"):
        PLUGINS.host("transformers").install(colour="red")


def test_a_transformers_that_changed_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModel, "from_pretrained", "another thing")
    before = methods()
    with pytest.raises(gptq.PluginError, match="no from_pretrained in AutoModel"):
        gptq.enable_transformers(plugins=PLUGINS)
    assert methods() == before, "nothing was replaced"


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", NAMES)
def test_every_checkpoint_is_exact(name: str) -> None:
    assert off_by(DATA / name, name) <= FLOAT32


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_load_gives(name: str) -> None:
    ids, _ = expected(name)
    model = AutoModelForCausalLM.from_pretrained(
        DATA / name, device_map="auto", trust_remote_code=False, revision="main"
    )
    with gptq.load(DATA / name, device="cpu") as loaded:
        assert torch.equal(logits(model, ids), logits(loaded.model, ids))
        assert model.dtype == loaded.model.dtype
        assert model.hf_quantizer.plan.kernels() == loaded.plan.kernels()
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def old_name(folder: Path) -> None:
    only_quantize_config(folder)
    rename_weights(folder, "gptq_model-4bit-128g.safetensors")


def no_config_and_old_name(folder: Path) -> None:
    without_config(folder)
    rename_weights(folder, "4bit-128g.safetensors")


def pickled(folder: Path) -> None:
    without_config(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "llama-4bit.pt")
    (folder / "model.safetensors").unlink()


def lying_label(folder: Path) -> None:
    stored = json.loads((folder / "quantize_config.json").read_text())
    set_field(folder, checkpoint_format="gptq" if "v2" in str(stored) else "gptq_v2")


def lying_width(folder: Path) -> None:
    set_field(folder, bits=8, group_size=512, desc_act=False)


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "alter",
    [only_quantize_config, old_name, without_config, no_config_and_old_name, pickled, lying_label,
     lying_width],
)  # fmt: skip
def test_no_file_makes_weights_random(alter: Callable[[Path], None], tmp_path: Path) -> None:
    folder = copy_of(ONE, tmp_path / "altered")
    alter(folder)
    assert off_by(folder, ONE) <= FLOAT32


@pytest.mark.usefixtures("enabled")
def test_a_damaged_checkpoint_is_an_error(tmp_path: Path) -> None:
    folder = copy_of(ONE, tmp_path / "altered")
    edit_tensors(folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(gptq.TensorMismatch, match=r"model\.norm\.weight is missing"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_is_not_gptq_is_left_alone(tmp_path: Path) -> None:
    other = copy_of(ONE, tmp_path / "awq")
    edit_json(
        other / "config.json",
        lambda config: config["quantization_config"].update(quant_method="awq"),
    )
    (other / "quantize_config.json").unlink()

    def load() -> tuple[Any, str]:
        dense = AutoModelForCausalLM.from_pretrained(BASE)
        with pytest.raises(ValueError, match="Invalid format") as raised:
            AutoModelForCausalLM.from_pretrained(other)
        return dense, str(raised.value)

    stock, stock_error = load()
    gptq.enable_transformers(plugins=PLUGINS)
    try:
        model, error_text = load()
    finally:
        gptq.disable_transformers(plugins=PLUGINS)
    assert error_text == stock_error
    assert getattr(model, "hf_quantizer", None) is None
    assert model.config.to_dict() == stock.config.to_dict()
    assert all(
        torch.equal(one, other)
        for one, other in zip(model.state_dict().values(), stock.state_dict().values(), strict=True)
    )


@pytest.mark.usefixtures("enabled")
def test_a_model_made_from_nothing_is_left_alone() -> None:
    state = tiny_model("llama").state_dict()
    model = LlamaForCausalLM.from_pretrained(None, config=MODELS["llama"][0], state_dict=state)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["float32", torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("enabled")
def test_the_requested_dtype_is_the_models(dtype: Any) -> None:
    requested = getattr(torch, str(dtype).removeprefix("torch."))
    for model in (
        AutoModelForCausalLM.from_pretrained(DATA / ONE, dtype=dtype),
        LlamaForCausalLM.from_pretrained(DATA / ONE, torch_dtype=dtype),
    ):
        assert model.dtype == model.config.dtype == requested
        assert model.model.embed_tokens.weight.dtype == requested
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.usefixtures("enabled")
def test_options_are_honoured(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(DATA / ONE)
    config.max_position_embeddings = 77
    configured = AutoModelForCausalLM.from_pretrained(
        DATA / ONE, config=config, attn_implementation="eager"
    )
    assert configured.config.max_position_embeddings == 77
    assert configured.config._attn_implementation == "eager"
    assert hasattr(config, "quantization_config"), "the config that was passed is untouched"
    set_by_name = LlamaForCausalLM.from_pretrained(DATA / ONE, use_cache=False)
    assert set_by_name.config.use_cache is False
    assert set_by_name.name_or_path == str(DATA / ONE)
    copy_of(ONE, tmp_path / "inner")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path, subfolder="inner", output_loading_info=True, low_cpu_mem_usage=True
    )
    assert type(model) is LlamaForCausalLM
    assert not any(info.values())
    settings = transformers.GenerationConfig(max_new_tokens=3)
    model = AutoModelForCausalLM.from_pretrained(DATA / ONE, generation_config=settings)
    assert model.generation_config.max_new_tokens == 3


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(
    ("device_map", "places"),
    [
        (None, None),
        ("auto", {"": "cpu"}),
        ("sequential", {"": "cpu"}),
        ("cpu", {"": "cpu"}),
        (torch.device("cpu"), {"": "cpu"}),
        ({"": "cpu"}, {"": "cpu"}),
        ({"": "cpu", "model.layers.1": "disk"}, {"": "cpu", "model.layers.1": "disk"}),
    ],
)
def test_device_maps(device_map: Any, places: Any, tmp_path: Path) -> None:
    if device_map in ("auto", "sequential", None) and torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator, which is taken first")
    model = AutoModelForCausalLM.from_pretrained(
        DATA / ONE, device_map=device_map, offload_folder=tmp_path
    )
    assert getattr(model, "hf_device_map", None) == places
    ids, right = expected(ONE)
    assert error(logits(model, ids), right) <= 3e-2


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_plan": "auto"}, "cannot be loaded with tp_plan"),
        ({"variant": "fp16"}, "cannot be loaded with variant"),
        ({"colour": "red"}, "from_pretrained has no option colour"),
        ({"device_map": "balanced_low_0"}, "balanced_low_0"),
        ({"dtype": "float8"}, "float8"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            "cannot be quantised again by bitsandbytes",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: Any, message: str) -> None:
    with pytest.raises(gptq.OptionInvalid, match=message):
        LlamaForCausalLM.from_pretrained(DATA / ONE, **options)


@pytest.mark.usefixtures("enabled")
def test_the_body_alone_and_classes_without_text(tmp_path: Path) -> None:
    ids, _ = expected(ONE)
    whole = AutoModelForCausalLM.from_pretrained(DATA / ONE)
    body = AutoModel.from_pretrained(DATA / ONE)
    assert type(body) is transformers.LlamaModel
    assert body.is_quantized
    with torch.inference_mode():
        states = body(ids).last_hidden_state
    assert torch.equal(whole.lm_head(states), logits(whole, ids))
    legacy = copy_of(ONE, tmp_path / "legacy")
    only_quantize_config(legacy)
    with pytest.raises(
        gptq.OptionInvalid, match="LlamaForSequenceClassification does not generate"
    ):
        AutoModelForSequenceClassification.from_pretrained(legacy)
    with pytest.raises(ImportError, match="optimum"):  # transformers' own error
        AutoModelForSequenceClassification.from_pretrained(DATA / ONE)


@pytest.mark.usefixtures("enabled")
@pytest.mark.filterwarnings("ignore:Passing `generation_config`")
def test_generate_and_pipeline_answer_as_a_loaded_model_does() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / ONE)
    model = AutoModelForCausalLM.from_pretrained(DATA / ONE, device_map="cpu")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)
    text = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    with gptq.load(DATA / ONE, device="cpu") as loaded:
        options = gptq.GenerateOptions(temperature=0, max_new_tokens=16)
        assert loaded.generate(PROMPT, options).text == text.rstrip(HALF)
    by_model = pipeline("text-generation", model=model, tokenizer=tokenizer)
    by_path = pipeline("text-generation", model=str(DATA / ONE), device_map="cpu")
    for answer in (by_model, by_path):
        assert answer.model.hf_quantizer.plan.kernels() == model.hf_quantizer.plan.kernels()
        options = {"do_sample": False, "max_new_tokens": 16, "return_full_text": False}
        assert answer(PROMPT, **options)[0]["generated_text"] == text


@pytest.mark.usefixtures("enabled")
def test_a_branch_of_the_hubs_cache(tmp_path: Path) -> None:
    """`revision=` selects the branch; nothing is fetched."""
    repo = tmp_path / "models--owner--name"
    for branch, name in (("main", NAMES[0]), ("gptq-4bit-32g", ONE)):
        commit = f"{len(branch):040x}"
        copy_of(name, repo / "snapshots" / commit)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
    options: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    for branch, name in ((None, NAMES[0]), ("gptq-4bit-32g", ONE)):
        chosen = {} if branch is None else {"revision": branch}
        ids, right = expected(name)
        model = AutoModelForCausalLM.from_pretrained(
            "owner/name", dtype="float32", **chosen, **options
        )
        assert error(logits(model, ids), right) <= FLOAT32
        assert model.name_or_path == "owner/name"
    with pytest.raises(OSError, match="couldn't"):
        AutoModelForCausalLM.from_pretrained("owner/name", revision="no-such", **options)


def test_threads_do_not_disturb_each_other() -> None:
    """Dense and GPTQ models load at once while the host comes and goes."""
    dense = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    ids, right = expected(ONE)
    expected_dense = logits(dense, ids)
    failed: list[object] = []

    def run(work: Callable[[], bool]) -> None:
        try:
            if not all(work() for _ in range(4)):
                failed.append(work)
        except Exception as raised:  # noqa: BLE001 - reported by the test
            failed.append(raised)

    def load_gptq() -> bool:
        with gptq.load(DATA / ONE, device="cpu", dtype="float32") as loaded:
            return error(logits(loaded.model, ids), right) <= FLOAT32

    def from_pretrained() -> bool:
        return off_by(DATA / ONE, ONE) <= FLOAT32

    def load_dense() -> bool:
        model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
        return torch.equal(logits(model, ids), expected_dense)

    def enable_again() -> bool:
        gptq.enable_transformers(plugins=gptq.Plugins(host))
        return True

    gptq.enable_transformers(plugins=PLUGINS)
    works = (load_gptq, from_pretrained, from_pretrained, load_dense, enable_again)
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    join(*threads)
    gptq.disable_transformers(plugins=PLUGINS)
    assert not failed
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", NAMES)
def test_a_save_has_the_checkpoints_own_tensors(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DATA / name)
    model.save_pretrained(tmp_path)
    stored, saved = (load_file(path / "model.safetensors") for path in (DATA / name, tmp_path))
    assert stored.keys() == saved.keys()
    for key, tensor in stored.items():
        assert saved[key].dtype == tensor.dtype, key
        assert torch.equal(saved[key], tensor), key
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    planned = model.hf_quantizer.plan.config
    for field in ("bits", "group_size", "desc_act", "sym", "checkpoint_format"):
        assert config[field] == getattr(planned, field)
    assert config["quant_method"] == "gptq"
    ids, _ = expected(name)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids), logits(model, ids)
    )


@pytest.mark.usefixtures("enabled")
def test_a_save_tells_the_truth_where_the_source_lied(tmp_path: Path) -> None:
    source = copy_of(ONE, tmp_path / "source")
    lying_width(source)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["desc_act"]) == (4, 32, True)


@pytest.mark.usefixtures("enabled")
def test_a_save_has_what_was_changed(tmp_path: Path) -> None:
    """Also over itself; a second save would copy from files that are other ones now."""
    folder = copy_of(ONE, tmp_path / "checkpoint")
    ids, _ = expected(ONE)
    for factor in (1.5, 0.5):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.model.norm.weight.data.mul_(factor)
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(again, ids), logits(model, ids))
        with pytest.raises(gptq.CheckpointError, match="were changed since"):
            model.save_pretrained(tmp_path / "elsewhere")
    again.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    sharded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert torch.equal(logits(sharded, ids), logits(again, ids))


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", SEQUENTIAL[:1])
def test_a_save_adds_the_row_groups_that_old_files_lack(name: str, tmp_path: Path) -> None:
    folder = copy_of(name, tmp_path / "old")
    stored = load_file(DATA / name / "model.safetensors")
    others = {key: tensor for key, tensor in stored.items() if not key.endswith(".g_idx")}
    save_file(others, folder / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in stored.items())


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("name", ["gpt2", "llama_tied", "mixtral", "phi3", "qwen3_moe"])
def test_a_save_has_the_names_of_its_architecture(name: str, tmp_path: Path) -> None:
    """Renamed layers, fused projections, experts that are quantised one by one, tied heads."""
    out = tmp_path / "gptq"
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    quantize(tiny_model(name), tokenizer, out, options=OPTIONS, samples=samples())
    ids = torch.tensor(samples()[:1])
    model = AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    model.save_pretrained(tmp_path / "saved")
    stored, saved = (load_file(path / "model.safetensors") for path in (out, tmp_path / "saved"))
    assert saved.keys() == stored.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in stored.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float32")
    assert torch.equal(logits(again, ids), logits(model, ids))


@pytest.mark.usefixtures("enabled")
def test_a_model_is_copied_and_pickled_and_stays_where_it_is() -> None:
    ids, _ = expected(ONE)
    model = AutoModelForCausalLM.from_pretrained(DATA / ONE)
    right = logits(model, ids)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(made, ids), right)
    for cast in (model.half, model.float, lambda: model.to(torch.float16)):
        with pytest.raises(ValueError, match=r"not supported for quantized|cannot cast a GPTQ"):
            cast()
    assert model.to("cpu") is model
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(gptq.OptionInvalid, match="prepared for cpu, and cannot be moved to cuda"):
        layer._apply(lambda _: SimpleNamespace(device=torch.device("cuda")))


@pytest.mark.usefixtures("enabled")
def test_layers_are_linears_whose_weights_are_read_when_used() -> None:
    model = AutoModelForCausalLM.from_pretrained(DATA / ONE)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, torch.nn.Linear)
    weight = layer.weight
    assert tuple(weight.shape) == (layer.out_features, layer.in_features)
    assert weight.dtype == model.dtype
    assert weight.untyped_storage().nbytes() == 0 or weight.data_ptr() == 0
    x = torch.randn(3, layer.in_features, dtype=model.dtype)
    assert error(layer(x), torch.nn.functional.linear(x, weight)) <= 1e-2
    assert "weight" not in dict(layer.named_parameters()) | layer.state_dict()
