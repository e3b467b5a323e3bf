"""What a kernel must keep to beside its products."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from gptq_loader_plugin.conformance.check import SPIKE, Oracle, consider, off_by, tolerance
from gptq_loader_plugin.conformance.cover import pairwise_cover
from gptq_loader_plugin.conformance.grid import AXES, possible_layers
from gptq_loader_plugin.conformance.layers import Case, make_layer, make_spec
from gptq_loader_plugin.verdict import Accepted, Declined

if TYPE_CHECKING:
    from gptq_loader_plugin.conformance.grid import Cell
    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import Kernel, LayerSpec, PackedLinear

LAYERS = 8  # of those a kernel accepts, each test takes so many, as different as the cover's first
LARGE = [
    Case(bits=bits, group_size=size, rows=1024, columns=1024, sym=False, act_order=act)
    for bits in (2, 3, 4, 8)
    for size, act in ((128, True), (128, False), (32, True), (-1, False))
]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that the kernel accepts, with its right answers."""

    cell: Cell
    spec: LayerSpec
    packed: PackedLinear
    oracle: Oracle
    computes_in: str

    def rows(self, dtype: str, device: Device) -> torch.Tensor:
        """Return 17 rows of x."""
        return self.oracle.x[:17].to(getattr(torch, dtype)).to(device.torch_name)

    def hold(self, y: torch.Tensor, dtype: str, rows: slice, *, lowered: str | None = None) -> None:
        """Hold some rows of the answer to the tolerance, or that of a dtype it was lowered to."""
        answers = self.oracle.answers[dtype]
        error, spike = off_by(y[rows], answers[:17][rows], answers)
        allowed = max(
            tolerance(dtype_name, dtype)
            for dtype_name in (self.computes_in, lowered or self.computes_in)
        )
        assert y.dtype == getattr(torch, dtype)
        assert error <= allowed, f"{self.cell}: off by {error:.1e}"
        assert spike <= SPIKE * allowed, f"{self.cell}: one value is off by {spike:.1e}"


@pytest.fixture(scope="module")
def layers(kernel: Kernel, device: Device) -> list[Layer]:
    """Some layers that the kernel accepts."""
    layers: list[Layer] = []
    reason = ""
    for cell in pairwise_cover(possible_layers()):
        verdict = consider(kernel, make_spec(cell.case), device)
        if isinstance(verdict, Declined):
            reason = reason or verdict.reason
            continue
        spec, packed, weight = make_layer(cell.case)
        layers.append(Layer(cell, spec, packed, Oracle.of(weight, packed.bias), verdict.exactness))
        if len(layers) == LAYERS:
            return layers
    if not layers:
        pytest.skip(f"{kernel.name}: {reason}")
    return layers


def test_leaves_the_checkpoint_alone_and_prepares_twice(
    kernel: Kernel, device: Device, layers: list[Layer]
) -> None:
    """The tensors may be mapped read-only, and be wanted again; so may x."""
    for layer in layers:
        before = _tensors(layer.packed, copied=True)
        x = layer.rows("float32", device)
        original = x.clone()
        for _ in range(2):
            module = kernel.prepare(layer.spec, layer.packed, device)
            with torch.inference_mode():
                layer.hold(module(x), "float32", slice(None))
        assert torch.equal(x, original), f"{layer.cell}: x was changed"
        for name, after in _tensors(layer.packed).items():
            assert torch.equal(before[name], after), f"{layer.cell}: {name} was changed"


def test_a_copy_answers_without_the_original(
    kernel: Kernel, device: Device, layers: list[Layer]
) -> None:
    """Models are copied with `copy.deepcopy`."""
    for layer in layers:
        module = kernel.prepare(layer.spec, layer.packed, device)
        x = layer.rows("float32", device)
        with torch.inference_mode():
            module(x)
            copied = copy.deepcopy(module)
            del module
            layer.hold(copied(x), "float32", slice(None))


@pytest.mark.parametrize("dtype", AXES["dtype"])
def test_casting_the_model_harms_no_packed_number(
    kernel: Kernel, device: Device, layers: list[Layer], dtype: str
) -> None:
    """A model's .to(dtype) may round what is floating, and nothing else."""
    for layer in layers:
        module = kernel.prepare(layer.spec, layer.packed, device).to(getattr(torch, dtype))
        with torch.inference_mode():
            y = module(layer.rows(dtype, device))
        layer.hold(y, dtype, slice(None), lowered=dtype)


def test_saving_the_model_saves_no_packed_numbers(
    kernel: Kernel, device: Device, layers: list[Layer]
) -> None:
    """A file with a kernel's own layout in it is one that nothing reads."""
    for layer in layers:
        module = kernel.prepare(layer.spec, layer.packed, device)
        kept = [
            name for name, tensor in module.state_dict().items() if not tensor.is_floating_point()
        ]
        assert not kept, f"{layer.cell}: register {kept} with persistent=False"


@pytest.mark.parametrize("dtype", AXES["dtype"])
def test_a_row_does_not_depend_on_its_neighbours(
    kernel: Kernel, device: Device, layers: list[Layer], dtype: str
) -> None:
    """A large row beside it, or one that is not a number, changes no row of a batch."""
    for layer in layers:
        module = kernel.prepare(layer.spec, layer.packed, device)
        x = layer.rows(dtype, device)
        x[1::4] *= 100  # more, and float16 overflows
        x[3::4] = torch.nan
        with torch.inference_mode():
            layer.hold(module(x), dtype, slice(0, None, 2))


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_takes_the_bytes_it_says(kernel: Kernel, device: Device, case: Case) -> None:
    """`explain` adds up prepared_bytes before anything is loaded."""
    spec, packed, _ = make_layer(case)
    verdict = consider(kernel, spec, device)
    if isinstance(verdict, Declined):
        pytest.skip(f"{kernel.name}: {verdict.reason}")
    module = kernel.prepare(spec, packed, device)
    storages = {
        buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes()
        for buffer in (*module.buffers(), *module.parameters())
    }
    assert verdict.prepared_bytes == pytest.approx(sum(storages.values()), rel=0.03)


def test_answers_from_shapes_alone_and_the_same_each_time(kernel: Kernel, device: Device) -> None:
    """`explain` imports no torch, and asks again and again."""
    specs = [make_spec(cell.case) for cell in pairwise_cover(possible_layers(), times=1)]
    verdicts = [consider(kernel, spec, device) for spec in specs]
    assert verdicts == [kernel.consider(spec, device) for spec in specs]
    assert all(isinstance(verdict, Accepted | Declined) for verdict in verdicts)
    done = subprocess.run(  # noqa: S603 - our own words, in this Python
        [sys.executable, "-c", ELSEWHERE],
        input=pickle.dumps((kernel.name, device, specs)),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert pickle.loads(done.stdout) == verdicts  # noqa: S301 - we wrote it
    assert not done.stderr, done.stderr.decode()


ELSEWHERE = """
import pickle, sys
from gptq_loader_plugin.plugins import Plugins

name, device, specs = pickle.load(sys.stdin.buffer)
kernel = next(it for it in Plugins(installed=True).kernels() if it.name == name)
verdicts = [kernel.consider(spec, device) for spec in specs]
if "torch" in sys.modules:
    sys.exit("to consider a layer, the kernel imports torch")
sys.stdout.buffer.write(pickle.dumps(verdicts))
"""


def _tensors(packed: PackedLinear, *, copied: bool = False) -> dict[str, torch.Tensor]:
    tensors = {
        name: getattr(packed, name) for name in ("qweight", "zeros", "scales", "g_idx", "bias")
    }
    return {
        name: tensor.clone() if copied else tensor
        for name, tensor in tensors.items()
        if tensor is not None
    }
