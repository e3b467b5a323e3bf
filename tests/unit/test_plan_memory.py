"""Memory in a plan that layers use in turn: counted once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from altered import DATA, ONE

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.reader import open_checkpoint
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.kernel import Accepted
from gptq_loader_plugin.planning.placement import place
from gptq_loader_plugin.planning.plan import make_plan

if TYPE_CHECKING:
    import torch

    from gptq_loader_plugin.device import Device
    from gptq_loader_plugin.kernel import LayerSpec


@dataclass
class Fake:
    """A kernel that takes as much scratch as a layer has inputs."""

    name: str
    only: str = ""

    def consider(self, layer: LayerSpec, device: Device) -> Accepted | gptq.Declined:
        if self.only and self.only not in layer.name:
            return gptq.Declined(self.name, "is for others")
        rank = 2 if self.only else 1
        return Accepted(self.name, rank, "float32", 100, scratch_bytes=layer.in_features)

    def prepare(self, layer: Any, packed: Any, device: object) -> torch.nn.Module:
        raise NotImplementedError


def test_the_largest_scratch_of_each_kernel_counts_once() -> None:
    checkpoint = open_checkpoint(DATA / ONE)
    kernels = [Fake("all"), Fake("some", "q_proj")]
    found = make_plan(checkpoint, find_device("cpu"), kernels, reference="")
    assert found.kernels() == {"all": 12, "some": 2}
    assert found.scratch_bytes == 192 + 128
    assert found.memory_bytes == found.weight_bytes + 320
    assert found.to_json()["scratch_bytes"] == 320
    assert "\n  scratch 320 bytes more, which layers use in turn\n" in found.explain()


def test_a_place_has_room_for_the_scratch_of_its_layers() -> None:
    checkpoint = open_checkpoint(DATA / ONE)

    class Large(Fake):
        def consider(self, layer: LayerSpec, device: Device) -> Accepted:
            return Accepted(self.name, 1, "float32", 100, scratch_bytes=10**9)

    for limit, fits in ((1_010_000_000, True), (1_000_000_000, False)):
        places = place(
            checkpoint,
            [Large("large")],
            device_map="auto",
            max_memory={"cpu": limit, "disk": ""},
        )
        assert (places["model.layers.1"].name == "cpu") is fits
