"""The command that lets kernels measure themselves: which it asks; what it says without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from gptq_loader_plugin.cli.app import app
from gptq_loader_plugin.cli.tune import tune_kernels
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.device import Device, find_device
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.events import Progress
from gptq_loader_plugin.hookspecs import hookimpl
from gptq_loader_plugin.kernel import Accepted, Declined
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gptq_loader_plugin.kernel import LayerSpec, PackedLinear, Verdict

GPU = Device("cuda", capability=(8, 6), name="A GPU")


@dataclass
class FourBits:
    """Accepts 4 bits, and counts what it measured."""

    name: str = "four"
    measured: list[int] = field(default_factory=list)

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        if layer.bits != 4:
            return Declined(self.name, f"{layer.bits}-bit; it takes 4-bit only")
        return Accepted(self.name, 1, "float16", 1)

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> Any:
        raise NotImplementedError

    def tune(
        self, layers: Sequence[LayerSpec], device: Device, progress: Callable[[Progress], None]
    ) -> str:
        progress(Progress("tune", 1, 1, "shapes"))
        self.measured += [it.bits for it in layers]
        return f"{len(layers)} measured on {device.name}"


class Offer:
    def __init__(self, kernel: object) -> None:
        self.kernel = kernel

    @hookimpl
    def gptq_kernels(self) -> list[object]:
        return [self.kernel]


def test_every_kernel_that_can_be_tuned_measures_the_layers_it_accepts() -> None:
    kernel = FourBits()
    layers = [make_layer(Case(bits=bits))[0] for bits in (4, 8, 4)]
    found = tune_kernels(layers, GPU, Plugins(Offer(kernel)))
    assert found == {"four": "2 measured on A GPU"}
    assert kernel.measured == [4, 4]


def test_layers_that_no_tunable_kernel_runs_are_an_error_with_the_reasons() -> None:
    with pytest.raises(OptionInvalid, match="four: 8-bit; it takes 4-bit only"):
        tune_kernels([make_layer(Case(bits=8))[0]], GPU, Plugins(Offer(FourBits())))


@pytest.mark.skipif(find_device().type != "cpu", reason="there is a GPU here")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "error: there is no GPU here to measure on: this is cpu"),
        (["--device", "cpu"], "error: there is no GPU here to measure on: this is cpu"),
        (["--device", "cuda"], "error: there is no cuda on this machine"),
        (["--device", "cuda:sm86"], "error: cuda sm86 is not on this machine, so nothing can be"),
    ],
)
def test_without_a_gpu_it_says_so(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["tune", *arguments])
    assert done.exit_code == 1
    assert words in done.stderr
    assert "hint: " in done.stderr
