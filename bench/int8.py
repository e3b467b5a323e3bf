"""What activations of 8 bits cost and bring: perplexity, error, and speed of one layer.

    python bench/int8.py --text test.txt [REF] [--windows 20]

`cpu-int8` is asked also where it declines because AMX is faster; `cpu` is timed without AMX, which
is where the two compete. Error is the relative root mean square of the answers of a 4-bit layer of
4096x4096 to normal x, against float64; times are minima of interleaved rounds on one thread.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import gptq_loader_plugin as gptq
from gptq_loader_kernels.cpu import CpuInt8Kernel
from gptq_loader_kernels.cpu.library import Activations, Isa
from gptq_loader_kernels.cpu.linear import NativeLinear
from gptq_loader_plugin import hookimpl
from gptq_loader_plugin.conformance.layers import Case, make_layer
from gptq_loader_plugin.measure.perplexity import measure_perplexity
from gptq_loader_plugin.plugins import Plugins

if TYPE_CHECKING:
    from gptq_loader_plugin.kernel import Device, Kernel, LayerSpec, PackedLinear, Verdict

ROUNDS = 10
FEATURES = 4096


@dataclass(frozen=True, slots=True)
class AnywayInt8:
    """`cpu-int8` where AMX would have it declined."""

    name: str = "int8-anyway"

    def consider(self, layer: LayerSpec, device: Device) -> Verdict:
        """Answer as without AMX."""
        without = replace(device, features=device.features - {"amx_bf16"})
        return replace(CpuInt8Kernel().consider(layer, without), kernel=self.name)

    def prepare(self, layer: LayerSpec, packed: PackedLinear, device: Device) -> torch.nn.Module:
        """Prepare as `cpu-int8` does."""
        return CpuInt8Kernel().prepare(layer, packed, device)


class Plugin:
    """Offers it."""

    @hookimpl
    def gptq_kernels(self) -> list[Kernel]:
        """Offer the kernel."""
        return [AnywayInt8()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", nargs="?", default="demo")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--windows", type=int, default=20)
    arguments = parser.parse_args()
    if arguments.text is not None:
        compare_perplexity(arguments.reference, arguments.text, arguments.windows)
    compare_layers()


def compare_perplexity(reference: str, text: Path, windows: int) -> None:
    """Print the perplexity of a checkpoint by each kernel."""
    content = text.read_text(encoding="utf-8")
    plugins = Plugins(Plugin(), installed=True)
    found = {}
    for backend in ("cpu", AnywayInt8().name):
        with gptq.load(reference, device="cpu", backend=backend, plugins=plugins) as model:
            found[backend] = measure_perplexity(model, content, windows=windows).perplexity
        print(f"perplexity {found[backend]:.3f}  {backend}", flush=True)
    exact, rounded = found.values()
    print(f"moved by {rounded / exact - 1:+.2%}")


def compare_layers() -> None:
    """Print error and time of one layer for some numbers of rows."""
    _, packed, weight = make_layer(Case(rows=FEATURES, columns=FEATURES))
    size = {"in_features": FEATURES, "out_features": FEATURES}
    layers = {
        "cpu": NativeLinear(packed, isa=Isa.AVX512_BF16, amx=False, **size),
        "int8": NativeLinear(packed, activations=Activations.INT8, **size),
    }
    print("| rows | error cpu | error int8 | ms cpu | ms int8 | ratio |\n|---|---|---|---|---|---|")
    for rows in (1, 4, 16, 64, 512):
        x = torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(0)).bfloat16()
        right = x.double() @ weight.T
        least, error = dict.fromkeys(layers, float("inf")), {}
        for _ in range(ROUNDS):
            for name, layer in layers.items():
                began = time.thread_time()
                y = layer(x)
                least[name] = min(least[name], time.thread_time() - began)
                error[name] = float((y.double() - right).norm() / right.norm())
        cells = [f"{it:.1e}" for it in error.values()] + [
            f"{1e3 * it:.2f}" for it in least.values()
        ]
        print(f"| {rows} | {' | '.join(cells)} | {least['int8'] / least['cpu']:.2f} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
