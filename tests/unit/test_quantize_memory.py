"""Large models in little memory: weights streamed, states on disk, and runs that were killed."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA
from processes import run_process
from published import publish
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import gptq_loader_plugin as gptq
from gptq_loader_plugin.quantize import QuantizeOptions, memory, quantize_model, run
from gptq_loader_plugin.quantize.memory import forecast_memory
from gptq_loader_plugin.quantize.source import load_source, open_source
from gptq_loader_plugin.quantize.states import States
from gptq_loader_plugin.quantize.time_left import TimeLeft

if TYPE_CHECKING:
    from pathlib import Path

BASE = DATA / "base"
HIDDEN, INNER = 128, 384
BLOCK_BYTES = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER)


def options(**fields: Any) -> QuantizeOptions:
    return QuantizeOptions(**{"samples": 4, "seq_len": 64, "group_size": 32, **fields})


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave no room to tune all scales together, for which a model is read whole."""
    monkeypatch.setattr(memory, "tuning_bytes", lambda _: 0)


class AliveTensors(TorchDispatchMode):
    """Count the bytes of tensors on the CPU, each storage once, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self._alive = {key: it for key, it in self._alive.items() if not it[0].expired()}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return made


def llama(folder: Path, layers: int) -> Path:
    """Write a model of this many layers, in two shards or more."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        bos_token_id=380, eos_token_id=381,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500KB")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


def on_disk(*blocks: Any, **sizes: Any) -> Any:
    """Forecast as usual, and leave hidden states no memory."""
    return dataclasses.replace(forecast_memory(*blocks, **sizes), on_disk=True)


@pytest.mark.usefixtures("streamed")
def test_more_blocks_take_no_more_memory(tmp_path: Path) -> None:
    most = {}
    for layers in (2, 6):
        source = llama(tmp_path / f"{layers}", layers)
        with AliveTensors() as alive:
            quantize_model(source, tmp_path / f"{layers}-out", options=options())
        most[layers] = alive.most
    assert most[2] > BLOCK_BYTES
    assert most[6] - most[2] < BLOCK_BYTES / 2, "four more blocks"


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("effort", ["fast", "standard", "best"])
def test_the_forecast_is_what_is_alive_at_most(
    effort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecasts: list[Any] = []

    def note(*blocks: Any, **sizes: Any) -> Any:
        forecasts.append(forecast_memory(*blocks, **sizes))
        return forecasts[-1]

    monkeypatch.setattr(memory, "forecast_memory", note)
    source = llama(tmp_path / "source", 2)
    with AliveTensors() as alive:
        quantize_model(source, tmp_path / "out", options=options(effort=effort))
    foretold = forecasts[0].block + forecasts[0].states
    assert alive.most <= foretold <= 1.6 * alive.most


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize("effort", ["standard", "best"])
def test_streamed_weights_and_states_on_disk_make_the_same_files(
    effort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, text = options(effort=effort), "A text that is held out. " * 60
    quantize_model(BASE, tmp_path / "streamed", options=chosen, held_out=text)
    monkeypatch.setattr(run, "open_source", lambda source, **_: (*load_source(source), None))
    quantize_model(BASE, tmp_path / "whole", options=chosen, held_out=text)
    monkeypatch.setattr(run, "open_source", open_source)
    monkeypatch.setattr(memory, "forecast_memory", on_disk)
    states: list[Path] = []

    def look(_: gptq.Progress) -> None:
        states.extend((tmp_path / "spilled" / ".quantize").glob("*states"))

    quantize_model(BASE, tmp_path / "spilled", options=chosen, held_out=text, progress=look)
    used = {"states"} if effort == "standard" else {"states", "plain-states"}
    assert {it.name for it in states} == used
    expected = sorted(it.name for it in (tmp_path / "whole").iterdir())
    for other in ("streamed", "spilled"):
        assert sorted(it.name for it in (tmp_path / other).iterdir()) == expected
        for name in ("model.safetensors", "config.json", "quantize_config.json"):
            whole = (tmp_path / "whole" / name).read_bytes()
            assert (tmp_path / other / name).read_bytes() == whole, (other, name)


@pytest.mark.usefixtures("streamed")
@pytest.mark.parametrize(
    ("model_type", "is_streamed"),
    [
        ("gpt2", True),  # transposed weights, and a tied head
        ("gpt_oss", False),  # all experts in one tensor
        ("mixtral", True),  # experts by themselves, which transformers joins
        ("zamba2", False),  # one block in several places
        ("zaya", False),
    ],
)
def test_families_are_quantised_alike_streamed_and_whole(
    model_type: str, is_streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = publish(model_type, tmp_path / "published").original
    AutoTokenizer.from_pretrained(BASE).save_pretrained(source)
    assert (open_source(source)[2] is not None) == is_streamed
    if not is_streamed:
        return
    quantize_model(source, tmp_path / "streamed", options=options())
    monkeypatch.setattr(run, "open_source", lambda source, **_: (*load_source(source), None))
    quantize_model(source, tmp_path / "whole", options=options())
    streamed = load_file(tmp_path / "streamed" / "model.safetensors")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in whole.items())


@pytest.mark.usefixtures("streamed")
def test_torch_files_are_streamed_too(tmp_path: Path) -> None:
    quantize_model(BASE, tmp_path / "expected", options=options())
    source = tmp_path / "source"
    shutil.copytree(BASE, source)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    assert open_source(source)[2] is not None
    quantize_model(source, tmp_path / "out", options=options())
    expected = (tmp_path / "expected" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


KILLED = """
import os, signal, sys
from pathlib import Path
import gptq_loader_plugin.quantize.run as run
from gptq_loader_plugin.quantize import QuantizeOptions, quantize_model
source, out, stage, done = sys.argv[1:]
def progress(it):
    if it.stage == "quantize" and it.detail.startswith("model.layers.") and "," in it.detail:
        print("made", it.detail.partition(",")[0], flush=True)
    if (it.stage, it.done) == (stage, int(done)):
        os.kill(os.getpid(), signal.SIGKILL)
options = QuantizeOptions(samples=4, seq_len=64, group_size=32)
quantize_model(Path(source), Path(out), options=options, progress=progress)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL on Windows")
def test_a_run_that_is_killed_three_times_ends_as_one_that_is_not(tmp_path: Path) -> None:
    source = llama(tmp_path / "source", 3)
    quantize_model(source, tmp_path / "whole", options=options())
    made: list[list[str]] = []
    for stage, done in (("quantize", 10), ("quantize", 17), ("write", 5), ("none", 0)):
        command = [sys.executable, "-W", "ignore", "-c", KILLED, str(source)]
        ran = run_process([*command, str(tmp_path / "killed"), stage, str(done)], check=False)
        assert ran.returncode == (-signal.SIGKILL if done else 0), ran.stderr
        assert (tmp_path / "killed" / "config.json").exists() == (not done)
        made.append([it.split()[1].split(".")[2] for it in ran.stdout.splitlines()])
    # those of a block that was done are not made again
    assert [sorted(set(blocks)) for blocks in made] == [["0", "1"], ["1", "2"], ["2"], []]
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "killed" / "model.safetensors").read_bytes() == whole
    assert not list((tmp_path / "killed").glob(".*")), "nothing is left over"


def test_a_model_that_does_not_fit_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    with pytest.raises(gptq.NotEnoughMemory, match="even block by block") as caught:
        quantize_model(BASE, tmp_path / "out", options=options(), max_memory=1_000_000)
    assert "--max-memory" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_states_in_a_file_are_those_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inside, outside = States(), States(tmp_path / "states")
    for tokens in (3, 5, 2):
        batch = torch.randn(2, tokens, 4)
        inside.append(batch)
        outside.append(batch)
    changed = torch.randn(2, 5, 4)
    inside[1] = outside[1] = changed
    assert len(outside) == 3
    assert all(torch.equal(own, other) for own, other in zip(inside, outside, strict=True))
    assert torch.equal(outside[-1], inside[2])
    copied = outside.copy(tmp_path / "copy")
    outside[0] = torch.zeros(2, 3, 4)
    assert torch.equal(copied[0], inside[0])


def test_the_time_left_is_true_once_a_block_is_done() -> None:
    """Each block has a dear and a cheap layer, and takes as long again between layers."""
    now = [0.0]
    time = TimeLeft({f"{i}.{name}": cost for i in range(4) for name, cost in
                     (("q", 1.0), ("down", 9.0))}, now=lambda: now[0])  # fmt: skip
    assert time.left() is None
    told: list[tuple[float, float]] = []
    for i in range(4):
        time.begin()
        for name, takes in (("q", 10), ("down", 30)):
            now[0] += takes
            time.finish([f"{i}.{name}"])
            left = time.left()
            assert left is not None
            told.append((left, 320 - now[0]))
        now[0] += 40
        time.finish_block()
    for left, true in told[2:]:
        assert abs(left - true) <= 0.2 * true


def test_blocks_of_an_earlier_run_say_nothing_of_the_time() -> None:
    now = [0.0]
    time = TimeLeft({"0.q": 1.0, "1.q": 1.0, "2.q": 1.0}, now=lambda: now[0])
    now[0] = 500.0  # an earlier block runs, and is not made
    assert time.skip(["0.q"])
    time.finish_block()
    time.begin()
    now[0] += 8
    time.finish(["1.q"])
    now[0] += 2
    time.finish_block()
    time.begin()
    assert time.left() == 10
