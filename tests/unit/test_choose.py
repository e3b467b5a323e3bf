"""Choosing: every kernel is asked, the highest rank wins, every refusal is kept and shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from altered import DATA, ONE, plugins

import gptq_loader_plugin as gptq
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device, _rocm, _xpu, find_device, find_devices
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted, Declined
from gptq_loader_plugin.planning.choose import choose
from gptq_loader_plugin.system.units import write_size

if TYPE_CHECKING:
    from pathlib import Path

LAYER = make_layer(Case())[0]
CPU = Device("cpu")


@dataclass
class Fake:
    """A kernel that answers what it is told to."""

    name: str
    answer: Any

    def consider(self, layer: object, device: object) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def prepare(self, layer: Any, packed: Any, device: object) -> torch.nn.Module:
        return torch.nn.Linear(layer.in_features, layer.out_features, bias=False)


def yes(name: str, rank: int, note: str = "") -> Fake:
    return Fake(name, Accepted(name, rank, "float32", 100, note))


def no(name: str, reason: str) -> Fake:
    return Fake(name, Declined(name, reason))


def test_the_highest_rank_wins_and_the_rest_is_kept() -> None:
    kernels = [yes("slow", 1), no("other", "is for GPUs"), yes("fast", 9, "packed")]
    choice = choose(LAYER, CPU, kernels)
    assert choice.chosen.kernel == "fast"
    assert choice.reasons() == (
        ("fast", "chosen: packed"),
        ("slow", "could run it, in float32; ranks below fast"),
        ("other", "is for GPUs"),
    )


def test_equal_ranks_are_ordered_by_name() -> None:
    assert choose(LAYER, CPU, [yes("b", 5), yes("a", 5)]).chosen.kernel == "a"


def test_a_named_kernel_is_that_one_or_an_error() -> None:
    kernels = [yes("slow", 1), no("triton", "needs a CUDA GPU"), yes("fast", 9)]
    assert choose(LAYER, CPU, kernels, only="slow").chosen.kernel == "slow"
    with pytest.raises(gptq.NoBackend) as caught:
        choose(LAYER, CPU, kernels, only="triton")
    assert [it.kernel for it in caught.value.declined] == ["slow", "triton", "fast"]
    assert "needs a CUDA GPU" in str(caught.value)
    assert "leave backend out" in caught.value.hint


def test_nobody_is_an_error_with_every_reason() -> None:
    with pytest.raises(gptq.NoBackend, match="is for GPUs") as caught:
        choose(LAYER, CPU, [no("a", "is for GPUs"), no("b", "is 4-bit only")])
    assert "is 4-bit only" in caught.value.message
    assert "reference runs every layer" in caught.value.hint
    with pytest.raises(gptq.NoBackend, match="no kernel is installed"):
        choose(LAYER, CPU, [])


@pytest.mark.parametrize("answer", [RuntimeError("no driver"), None, True])
def test_a_kernel_that_fails_to_answer_is_named(answer: object) -> None:
    with pytest.raises(gptq.PluginError, match="the kernel bad") as caught:
        choose(LAYER, CPU, [yes("good", 1), Fake("bad", answer)])
    assert caught.value.hint


def test_a_kernel_that_multiplies_wrongly_is_found_at_load() -> None:
    class Wrong:
        @hookimpl
        def gptq_kernels(self) -> list[Any]:
            return [yes("wrong", 1000)]

    wrong = gptq.Plugins(
        Wrong(),
        installed=True,
        environ={"GPTQ_LOADER_PLUGINS": "core,kernel-reference"},
    )
    with pytest.raises(gptq.PluginError, match="the kernel wrong multiplies") as caught:
        gptq.load(DATA / ONE, device="cpu", plugins=wrong)
    assert "dense" in caught.value.hint
    model = gptq.load(DATA / ONE, device="cpu", plugins=wrong, check=False)
    assert model.plan.kernels() == {"wrong": 14}


@pytest.mark.parametrize(
    ("count", "text"),
    [(35_330_000_000, "35.33 GB"), (352_000_000, "352 MB"), (512, "512 bytes"), (2_000, "2 kB")],
)
def test_sizes_are_written_as_the_cards_do(count: int, text: str) -> None:
    assert write_size(count) == text


def test_the_cpu_is_always_there() -> None:
    assert find_devices()[-1].type == "cpu"
    cpu = find_device("cpu")
    assert (str(cpu), cpu.torch_name, cpu.present) == ("cpu", "cpu", True)
    assert cpu.memory_bytes


@pytest.mark.parametrize(
    ("name", "text", "capability"),
    [
        ("cuda:sm86", "cuda sm86", (8, 6)),
        ("CUDA:SM_90a", "cuda sm90", (9, 0)),
        ("cuda:sm120", "cuda sm120", (12, 0)),
        ("rocm:gfx1100", "rocm gfx1100", None),
        ("rocm", "rocm gfx1100", None),
    ],
)
def test_a_device_that_is_not_here_can_be_named(
    name: str, text: str, capability: tuple[int, int] | None
) -> None:
    device = find_device(name)
    assert (str(device), device.capability, device.present) == (text, capability, False)
    with pytest.raises(gptq.OptionInvalid, match="is not on this machine"):
        gptq.load(DATA / ONE, device=name, plugins=plugins())


def test_a_device_that_is_not_here_is_called_what_people_call_it() -> None:
    assert find_device("cuda:sm86").name == "RTX 30 series, A10"
    assert find_device("rocm:gfx942").name == "MI300"
    assert find_device("cuda:sm53").name == find_device("rocm:gfx803").name == ""


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_a_gpu_that_torch_knows_alone_is_only_planned_for(kind: str) -> None:
    device = find_device(kind)
    if device.present:
        pytest.skip("it is here")
    assert (str(device), device.torch_name, device.present) == (kind, kind, False)
    with pytest.raises(gptq.OptionInvalid, match=f"^{kind} is not on this machine"):
        gptq.load(DATA / ONE, device=kind, plugins=plugins())
    with pytest.raises(gptq.OptionInvalid, match="there is no"):
        find_device(f"{kind}:7")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:avx", "cuda:9", "rocm:9", "rocm:sm86", ""])
def test_a_device_that_is_none_is_said(name: str) -> None:
    with pytest.raises(gptq.OptionInvalid) as caught:
        find_device(name)
    assert caught.value.hint


def test_amd_gpus_are_read_from_the_kernel(tmp_path: Path) -> None:
    for node, version in ((0, 0), (1, 110000), (2, 90010)):
        folder = tmp_path / str(node) / "mem_banks" / "0"
        folder.mkdir(parents=True)
        (folder / "properties").write_text("heap_type 1\nsize_in_bytes 25753026560\n")
        words = f"cpu_cores_count 0\ngfx_target_version {version}\n"
        (tmp_path / str(node) / "properties").write_text(words)
    first, second = _rocm(tmp_path)
    assert (str(first), first.index, first.memory_bytes) == ("rocm gfx1100", 0, 25753026560)
    assert (str(second), second.torch_name) == ("rocm gfx90a", "cuda:1")


def test_intels_gpus_are_read_from_the_kernel(tmp_path: Path) -> None:
    for minor, vendor in ((129, "0x8086"), (128, "0x10de"), (130, "0x8086")):
        folder = tmp_path / f"renderD{minor}" / "device"
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
    first, second = _xpu(tmp_path, built=True)
    assert (str(first), first.torch_name, second.torch_name) == ("xpu", "xpu", "xpu:1")
    assert first.present
    assert _xpu(tmp_path, built=False) == ()
    assert _xpu(tmp_path) == ()  # torch is not built for them here
