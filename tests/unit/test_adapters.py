"""LoRA adapters beside a checkpoint: what the package peft computes, one for each reply."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, ONE, dequantized, edit_json, plugins
from lora_files import write_adapter
from safetensors.torch import load_file, save_file
from served import CHAT, Brake, running
from waiting import eventually

import gptq_loader_plugin as gptq
from gptq_loader_plugin.generation.batch import Batch
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.model.adapter_files import read_adapter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

peft = pytest.importorskip("peft")

# peft asks transformers by a name that this has renamed
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    # and saves the embeddings beside, where the head is changed
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
]
TOKENS = 8
GREEDY = gptq.GenerateOptions(temperature=0, max_new_tokens=TOKENS)
SEED = [{"role": "user", "content": "Hello"}]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "rooted": {
        "r": 8,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj", "lm_head"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"down_proj": 5},
    },
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Any]:
    """Peft's own models on the dequantised weights; each adapter is saved beside."""
    folder = tmp_path_factory.mktemp("lora")
    models: dict[str | None, Any] = {None: dequantized(DATA / ONE, torch.float32).eval()}
    for name, options in KINDS.items():
        torch.manual_seed(len(name))
        model = peft.get_peft_model(
            dequantized(DATA / ONE, torch.float32),
            peft.LoraConfig(init_lora_weights=False, **options),
        ).eval()
        with torch.no_grad():
            for path, tensor in model.named_parameters():
                if "lora_" in path:
                    tensor.normal_(0, 0.2)
        model.save_pretrained(folder / name)
        models[name] = model
    models["folder"] = folder
    return models


@pytest.fixture(scope="module")
def folders(trained: dict[str | None, Any]) -> dict[str, str | Path]:
    return {name: trained["folder"] / name for name in KINDS}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, str | Path]) -> Iterator[gptq.LoadedModel]:
    with gptq.load(
        DATA / ONE, device="cpu", dtype="float32", lora=folders, plugins=plugins()
    ) as model:
        yield model


def expected(model: Any, ids: Sequence[int]) -> tuple[list[int], list[torch.Tensor]]:
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            max_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, len(ids) :].tolist(), list(out.logits)


def check(written: list[tuple[int, torch.Tensor]], model: Any, ids: Sequence[int]) -> None:
    tokens, logits = expected(model, ids)
    assert [token for token, _ in written] == tokens
    for (_, mine), right in zip(written, logits, strict=True):
        assert float((mine - right).norm() / right.norm()) < 1e-5


@pytest.mark.parametrize("name", [None, *KINDS])
def test_a_reply_is_the_one_that_peft_writes(
    loaded: gptq.LoadedModel, trained: dict[str | None, Any], name: str | None
) -> None:
    ids, _ = loaded.encode_chat(SEED)
    written: list[tuple[int, torch.Tensor]] = []

    def watch(token: int, logits: torch.Tensor) -> None:
        written.append((token, logits.clone()))

    list(loaded.stream_ids(ids, GREEDY, watch=watch, adapter=name))
    check(written, trained[name], ids)


@pytest.mark.parametrize("engine", [False, True])
def test_each_reply_of_a_batch_has_its_own(
    folders: dict[str, str | Path],
    trained: dict[str | None, Any],
    monkeypatch: pytest.MonkeyPatch,
    *,
    engine: bool,
) -> None:
    monkeypatch.setenv("GPTQ_LOADER_ENGINE", str(int(engine)))
    installed = gptq.Plugins(installed=True) if engine else plugins()
    with gptq.load(
        DATA / ONE, device="cpu", dtype="float32", lora=folders, plugins=installed
    ) as model:
        assert (model.engine is not None) == engine
        model.keep(8)
        ids, _ = model.encode_chat(SEED)
        # twice, so that the second ones begin where keys and values of all are kept
        for _ in range(2):
            batch = Batch(model)
            written: dict[Any, tuple[str | None, list[tuple[int, torch.Tensor]]]] = {}
            for name in (None, *KINDS, None, *KINDS):
                kept: list[tuple[int, torch.Tensor]] = []

                def watch(
                    token: int,
                    logits: torch.Tensor,
                    kept: list[tuple[int, torch.Tensor]] = kept,
                ) -> None:
                    kept.append((token, logits.clone()))

                with torch.inference_mode():
                    generation = model.begin(ids, GREEDY, watch=watch, adapter=name)
                written[generation] = name, kept
                batch.add(generation)
            while len(batch):
                for _generation, piece in batch.step():
                    assert not isinstance(piece, Exception), piece
            for name, kept in written.values():
                check(kept, trained[name], ids)


def test_one_that_is_alone_writes_every_reply(
    folders: dict[str, str | Path], trained: dict[str | None, Any]
) -> None:
    with gptq.load(
        DATA / ONE, device="cpu", dtype="float32", lora=folders["plain"], plugins=plugins()
    ) as model:
        assert model.adapter == "plain"
        assert "LoRA plain: rank 4, on 4 layers" in model.explain()
        ids, _ = model.encode_chat(SEED)
        tokens, _ = expected(trained["plain"], ids)
        text = "".join(it.text for it in model.chat(SEED, GREEDY))
        assert text == model.tokenizer.decode(tokens, skip_special_tokens=True)
        model.adapter = None
        assert "".join(it.text for it in model.chat(SEED, GREEDY)) != text


def test_requests_choose_one_by_name(tmp_path: Path, folders: dict[str, str | Path]) -> None:
    def load(target: str | Path) -> gptq.LoadedModel:
        return gptq.load(target, device="cpu", dtype="float32", lora=folders, plugins=plugins())

    with running(tmp_path, start=ONE, loads=load) as served:
        listed = served.client.get("/v1/models").json()["data"]
        parents = {it["id"]: it.get("parent") for it in listed}
        assert parents["plain"] == parents["rooted"] == ONE
        answers = {}
        for name in (ONE, *KINDS):
            answer = served.post(CHAT, messages=SEED, model=name, temperature=0, max_tokens=TOKENS)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"] == name
            answers[name] = answer.json()["choices"][0]["message"]["content"]
        assert len(set(answers.values())) == len(answers)
        unknown = served.post(CHAT, messages=SEED, model="plian")
        assert unknown.status_code == 404


@pytest.mark.parametrize("max_num_seqs", [12, 5])
def test_many_clients_write_with_three_adapters_at_a_time(
    tmp_path: Path, max_num_seqs: int
) -> None:
    """On a CPU a batcher knows nothing of adapters: each such reply takes its step by itself."""
    names = ("one", "two", "three")
    adapters = {
        name: write_adapter(tmp_path / name, DATA / ONE, seed=i) for i, name in enumerate(names)
    }

    def load(target: str | Path) -> gptq.LoadedModel:
        return gptq.load(target, device="cpu", dtype="float32", lora=adapters, plugins=plugins())

    asked = [(name, f"Tell me about number {i}") for name in names for i in range(4)]
    options = gptq.GenerateOptions(temperature=0, max_new_tokens=40)
    with load(DATA / ONE) as model:
        alone = {}
        for name, text in asked:
            ids, _ = model.encode_chat([{"role": "user", "content": text}])
            pieces = model.stream_ids(ids, options, stop=model.template.stop, adapter=name)
            alone[name, text] = "".join(it.text for it in pieces)
    assert len(set(alone.values())) == len(alone)
    brake = Brake(load)
    written: dict[tuple[str, str], int] = dict.fromkeys(asked, 0)  # tokens, so far
    with (
        running(tmp_path, names=(ONE,), loads=brake, max_num_seqs=max_num_seqs) as served,
        ThreadPoolExecutor(len(asked)) as pool,
    ):

        def ask(key: tuple[str, str]) -> str:
            name, text = key
            body = {
                "model": name,
                "messages": [{"role": "user", "content": text}],
                "temperature": 0,
                "max_tokens": 40,
                "stream": True,
                "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            }
            reply = ""
            with served.client.stream("POST", CHAT, json=body) as answer:
                assert answer.status_code == 200, answer.read()
                for line in answer.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    written[key] = event["usage"]["completion_tokens"]
                    for choice in event["choices"]:
                        reply += choice["delta"].get("content") or ""
            return reply

        replies = {key: pool.submit(ask, key) for key in asked}
        try:
            begun = 0
            while begun < max_num_seqs:  # each piece of those there are lets another one begin
                brake.leave.release()
                begun += brake.began.acquire(timeout=0.2)

            def all_write() -> bool:
                brake.leave.release()
                return sum(count > 0 for count in written.values()) == max_num_seqs

            eventually(all_write, awaited="as many replies as there is room for")
            before = dict(written)
            brake.leave.release(10 * max_num_seqs)
            eventually(
                lambda: all(written[key] >= before[key] + 5 for key in asked if before[key]),
                awaited="every reply to go on as fast as the others",
            )
        finally:
            brake.let_go()
        assert {key: reply.result() for key, reply in replies.items()} == alone


def test_what_is_no_lora_of_this_model_is_refused(
    tmp_path: Path, folders: dict[str, str | Path], loaded: gptq.LoadedModel
) -> None:
    with pytest.raises(gptq.CheckpointNotFound, match=r"adapter_config.json"):
        read_adapter(tmp_path)
    for field, value in (("use_dora", True), ("peft_type", "IA3"), ("bias", "all")):
        folder = tmp_path / field
        folder.mkdir()
        for file in sorted(folders["plain"].glob("*.*")):  # type: ignore[union-attr]
            (folder / file.name).write_bytes(file.read_bytes())
        edit_json(folder / "adapter_config.json", lambda it, f=field, v=value: it.update({f: v}))
        with pytest.raises(gptq.UnsupportedFormat, match=r"DoRA|IA3|biases"):
            read_adapter(folder)
    edit_json(folder / "adapter_config.json", lambda it: it.update(bias="none"))
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key.replace("layers.1", "layers.9"): it for key, it in tensors.items()}, weights)
    with pytest.raises(gptq.OptionInvalid, match=r"layers\.9"):
        gptq.load(DATA / ONE, device="cpu", lora=folder, plugins=plugins())
    with pytest.raises(gptq.OptionInvalid, match="no adapter plian"):
        loaded.begin([1, 2], GREEDY, adapter="plian")


def test_adapters_are_named_as_users_write_them() -> None:
    assert LoadOptions(lora="a=/x").lora == {"a": "/x"}
    assert LoadOptions(lora=["a=/x", "/y/b/"]).lora == {"a": "/x", "b": "/y/b/"}
    assert LoadOptions(lora=[]).lora is None
    with pytest.raises(gptq.OptionInvalid, match="two adapters are called a"):
        LoadOptions(lora=["a=/x", "a=/y"])
    assert json.dumps(LoadOptions().lora) == "null"
