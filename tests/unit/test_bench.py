"""The bench command, on a tiny checkpoint; no time is asserted."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from altered import CPU_KERNELS, DATA, ONE, PLUGINS, plugins
from typer.testing import CliRunner

import gptq_loader_plugin as gptq
from gptq_loader_kernels.cpu import CpuKernel
from gptq_loader_kernels.cpu.library import find_library
from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.kernel import Meter, TopLogitsHead
from gptq_loader_plugin.measure import speed

if TYPE_CHECKING:
    from click.testing import Result

FEW = ("--device", "cpu", "--prompt", "24", "--tokens", "5", "--rounds", "2")
native = pytest.mark.skipif(find_library() is None, reason="the native library was not built")


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "MEMORY_BYTES", 8 << 20)


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", *arguments], env=PLUGINS)


def test_bench_as_json() -> None:
    done = bench(str(DATA / ONE), *FEW, "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kernels"] == {CPU_KERNELS[0]: 14}
    assert list(found["why"]) == [CPU_KERNELS[0]]
    assert 0 < found["prompt"]["median"] <= found["prompt"]["best"]
    assert 0 < found["reply"]["median"] <= found["reply"]["best"]
    assert found["load_seconds"] > 0
    assert found["peak_bytes"] >= found["peak_bytes_before"] > 0
    assert found["weight_bytes_per_second"] == pytest.approx(
        found["reply"]["median"] * found["token_bytes"]
    )
    if find_library():
        share = found["weight_bytes_per_second"] / found["memory"]["median"]
        assert found["share_of_memory"] == pytest.approx(share)
    else:
        assert found["memory"] is None
    assert "round 2 of 2: a reply of 5 tokens" in done.stderr


def test_bench_in_words() -> None:
    done = bench(str(DATA / ONE), *FEW, "--backend", "reference")
    assert done.exit_code == 0, done.stderr
    assert "reply of 5" in done.stdout
    assert re.search(r"reference +chosen", done.stdout)
    assert "of memory's speed" not in done.stdout  # this kernel does not measure memory


def test_bench_with_an_8_bit_head() -> None:
    done = bench(str(DATA / ONE), *FEW, "--head", "int8")
    assert done.exit_code == 0, done.stderr
    assert "the head is 8-bit" in done.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prompt", "100000"), "100,001 tokens are needed"),
        (("--rounds", "0"), "below 1"),
    ],
)
def test_bench_says_what_cannot_be_measured(options: tuple[str, ...], words: str) -> None:
    done = bench(str(DATA / ONE), *FEW, *options)
    assert done.exit_code == 1
    assert words in done.stderr


def test_an_embedding_is_not_read_for_a_token() -> None:
    model = gptq.load(DATA / ONE, device="cpu", head="stored", check=False, plugins=plugins())
    module = model.model
    tensors = (*module.parameters(), *module.buffers())
    everything = sum(it.numel() * it.element_size() for it in tensors)
    table = module.get_input_embeddings().weight
    head = module.get_output_embeddings().weight
    untied = speed.bytes_read_a_token(model)
    assert untied == everything - table.numel() * table.element_size()
    module.get_output_embeddings().weight = table
    assert speed.bytes_read_a_token(model) == everything - head.numel() * head.element_size()
    short = gptq.load(DATA / ONE, device="cpu", check=False, plugins=plugins())
    narrow: Any = short.model.get_output_embeddings()
    if isinstance(narrow, TopLogitsHead):
        assert speed.bytes_read_a_token(short) == untied - head.nbytes + narrow.extra_bytes


@native
def test_memory_is_read() -> None:
    kernel = CpuKernel()
    assert isinstance(kernel, Meter)
    found = kernel.read_bandwidth(8 << 20, find_device("cpu"))
    assert found is not None
    assert found > 0


@native
def test_memory_too_small_to_be_read_is_not_measured() -> None:
    assert CpuKernel().read_bandwidth(100, find_device("cpu")) is None
