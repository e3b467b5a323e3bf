"""Kernels whose rank goes by what memory is free, and what seven billion weights take."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from altered import ALL, DATA
from processes import run_process

import gptq_loader_plugin as gptq
from gptq_loader_plugin.checkpoint.config import read_stored_config
from gptq_loader_plugin.checkpoint.outline import outline
from gptq_loader_plugin.checkpoint.tensor_info import TensorInfo
from gptq_loader_plugin.device import Device, find_device
from gptq_loader_plugin.planning.free_memory import free_bytes, free_rocm
from gptq_loader_plugin.planning.plan import make_plan
from gptq_loader_plugin.system.memory import free_memory, total_memory

if TYPE_CHECKING:
    from pathlib import Path

    from gptq_loader_plugin.checkpoint.reader import Checkpoint
    from gptq_loader_plugin.planning.plan import Plan

GB = 10**9
P100 = Device("cuda", name="P100", capability=(6, 0), memory_bytes=16 * GB, assume_built=False)
WEIGHTS = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # that are quantised
PLAIN = 2 * (2 * 32000 * 4096 + 65 * 4096)  # bytes of the rest: embedding, head, norms


def llama_7b(folder: Path, *, act_order: bool = True) -> Checkpoint:
    """Llama-2-7B's headers, 4 bits in groups of 128, as its publishers of 2023 wrote them."""
    quantization = {"bits": 4, "group_size": 128, "desc_act": act_order, "sym": True}
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    config = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "vocab_size": 32000, "max_position_embeddings": 4096,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("F16", (32000, 4096)),
        "lm_head.weight": ("F16", (32000, 4096)),
        "model.norm.weight": ("F16", (4096,)),
    }
    linears = {f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"}
    linears |= {"mlp.gate_proj": (4096, 11008), "mlp.up_proj": (4096, 11008)}
    linears |= {"mlp.down_proj": (11008, 4096)}
    for block in range(32):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{block}.{name}.weight"] = ("F16", (4096,))
        for name, (rows, columns) in linears.items():
            layer = f"model.layers.{block}.{name}"
            shapes[f"{layer}.qweight"] = ("I32", (rows // 8, columns))
            shapes[f"{layer}.qzeros"] = ("I32", (rows // 128, columns // 8))
            shapes[f"{layer}.scales"] = ("F16", (rows // 128, columns))
            shapes[f"{layer}.g_idx"] = ("I32", (rows,))
    headers = {
        name: TensorInfo(name, dtype, shape, file, 0) for name, (dtype, shape) in shapes.items()
    }
    stored, _ = read_stored_config(folder)
    size = sum(header.nbytes for header in headers.values())
    return outline(headers, stored, folder=folder, size_bytes=size)


def plan(checkpoint: Checkpoint, device: Device, **options: Any) -> Plan:
    kernels = gptq.Plugins(installed=True, environ=ALL).kernels()
    return make_plan(checkpoint, device, kernels, reference="7B", **options)


def reason(found: Plan, kernel: str) -> str:
    return dict(found.choices[0].reasons())[kernel]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["cuda:sm60", "mps", "xpu"])
def test_seven_billion_weights_stay_packed_on_every_gpu(
    name: str, act_order: bool, tmp_path: Path
) -> None:
    device = replace(find_device(name), assume_built=False)
    found = plan(llama_7b(tmp_path, act_order=act_order), device)
    assert found.kernels() == {"torch": 224}
    orders = 4 * 32 * (6 * 4096 + 11008) if act_order else 0
    packed = WEIGHTS // 2 + WEIGHTS // 128 * 2 + 224 + orders  # codes, scales, a zero each
    assert found.weight_bytes == packed + PLAIN
    part = 1 << 25  # weights: their codes, and they in 16 bits
    assert 0.98 * 3 * part <= found.scratch_bytes <= 3 * part
    assert found.memory_bytes < 4.1 * GB
    named = plan(llama_7b(tmp_path), device, backend="dense")
    assert named.weight_bytes == 2 * WEIGHTS + PLAIN
    assert named.weight_bytes > 13.4 * GB
    assert not named.scratch_bytes
    # 13.48 GB, a tenth of it, a context of 4,096 and 1 GB
    words = "could run it, in float16; needs 17.97 GB with a context, and what is free is not known"
    assert reason(found, "dense") == words
    assert reason(named, "dense").endswith("about 4 times the packed bytes")


@pytest.mark.parametrize("name", ["cuda:sm70", "cuda:sm75", "cuda:sm86", "rocm"])
def test_seven_billion_weights_stay_packed_where_triton_runs(name: str, tmp_path: Path) -> None:
    found = plan(llama_7b(tmp_path), replace(find_device(name), assume_built=False))
    assert found.kernels() == {"triton": 224}
    assert found.memory_bytes < 4.1 * GB


@pytest.mark.parametrize(("free", "kernel"), [(15, "torch"), (17.98, "dense"), (24, "dense")])
def test_dense_is_chosen_where_the_whole_model_fits_comfortably(
    free: float, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = int(free * GB)
    monkeypatch.setattr("gptq_loader_plugin.planning.headroom.free_bytes", lambda _: size)
    found = plan(llama_7b(tmp_path), P100)
    assert found.kernels() == {kernel: 224}
    needs = f"needs 17.97 GB with a context, and {free:.2f} GB is free"
    if kernel == "torch":
        assert reason(found, "dense") == f"could run it, in float16; {needs}"
        assert reason(found, "torch").endswith("unpacked a part at a time, to float16")
    else:
        assert reason(found, "dense").endswith(f"about 4 times the packed bytes; {needs}")
        assert reason(found, "torch") == "could run it, in float16; ranks below dense"
    assert plan(llama_7b(tmp_path), P100, backend="torch").kernels() == {"torch": 224}


def test_a_kernel_that_fuses_goes_before_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptq_loader_plugin.planning.headroom.free_bytes", lambda _: 100 * GB)
    found = plan(llama_7b(tmp_path), replace(P100, capability=(8, 6), present=False))
    assert found.kernels() == {"triton": 224}
    assert reason(found, "dense") == "could run it, in float16; ranks below triton"
    assert reason(found, "torch") == "could run it, in float16; ranks below triton"


def test_over_several_places_weights_stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are placed by what they take packed."""
    monkeypatch.setattr("gptq_loader_plugin.planning.headroom.free_bytes", lambda _: 100 * GB)
    three = DATA / "gptq-3bit-128g-act-sym"
    offered = gptq.Plugins(
        installed=True, environ={"GPTQ_LOADER_PLUGINS": "core,kernel-dense,kernel-torch"}
    )
    places = {"": "cpu", "model.layers.1": "disk"}
    assert gptq.explain(three, device_map=places, plugins=offered).kernels() == {"torch": 14}
    assert gptq.explain(three, device="cpu", plugins=offered).kernels() == {"dense": 14}


def test_what_is_free_is_asked_where_that_can_be() -> None:
    cpu = find_device("cpu")
    assert 0 < (free_bytes(cpu) or 0) <= total_memory()
    shared = free_bytes(replace(cpu, type="mps", memory_bytes=10**6))
    assert shared == 700_000
    assert 0 < (free_bytes(replace(cpu, type="mps")) or 0) <= free_memory() * 1.1
    assert free_bytes(find_device("rocm")) is None
    assert free_bytes(Device("xpu")) is None
    assert free_bytes(Device("cuda", index=99)) is None
    assert free_bytes(Device("rocm", index=99)) is None


def test_what_amd_gpus_have_free_is_read_from_the_driver(tmp_path: Path) -> None:
    nodes, renderers = tmp_path / "nodes", tmp_path / "drm"
    for node, words in enumerate((
        "gfx_target_version 0\n",
        "gfx_target_version 110000\ndrm_render_minor 129\n",
        "gfx_target_version 90010\ndrm_render_minor 128\n",
    )):  # fmt: skip
        (nodes / str(node)).mkdir(parents=True)
        (nodes / str(node) / "properties").write_text(words)
    for minor, total, used in ((128, 5000, 4000), (129, 700, 650)):
        folder = renderers / f"renderD{minor}" / "device"
        folder.mkdir(parents=True)
        (folder / "mem_info_vram_total").write_text(f"{total}\n")
        (folder / "mem_info_vram_used").write_text(f"{used}\n")
    assert free_rocm(0, nodes, renderers) == 50
    assert free_rocm(1, nodes, renderers) == 1000
    assert free_rocm(2, nodes, renderers) is None
    (renderers / "renderD129" / "device" / "mem_info_vram_used").unlink()
    assert free_rocm(0, nodes, renderers) is None


# What the driver and NVML of a machine with two GPUs answer, the first of which is hidden: CUDA
# counts the second alone, and NVML counts both.
LIBRARIES = {
    "libcuda.so.1": """
        #include <stdio.h>
        #include <string.h>
        int cuInit(unsigned flags) { return 0; }
        int cuDeviceGetCount(int *count) { *count = 1; return 0; }
        int cuDeviceGet(int *handle, int index) { *handle = 70; return index != 0; }
        int cuDeviceGetAttribute(int *value, int which, int handle) {
            *value = which == 75 ? 7 : 5;
            return handle != 70;
        }
        int cuDeviceTotalMem_v2(size_t *bytes, int handle) { *bytes = 16000000000; return 0; }
        int cuDeviceGetName(char *name, int length, int handle) {
            return snprintf(name, length, "Tesla T4") < 0;
        }
        int cuDeviceGetPCIBusId(char *bus, int length, int handle) {
            return snprintf(bus, length, "0000:65:00.0") < 0 || handle != 70;
        }
    """,
    "libnvidia-ml.so.1": """
        #include <string.h>
        typedef struct { unsigned long long total, free, used; } memory;
        static int started, gpu;
        int nvmlInit_v2(void) { started++; return 0; }
        int nvmlShutdown(void) { started--; return 0; }
        int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **handle) {
            *handle = &gpu;
            return strcmp(bus, "0000:65:00.0") || started != 1;
        }
        int nvmlDeviceGetMemoryInfo(void *handle, memory *answer) {
            memory it = {16000000000, 15100000000, 900000000};
            *answer = it;
            return handle != (void *)&gpu;
        }
    """,
}
ASK = """
from gptq_loader_plugin.device import find_device
from gptq_loader_plugin.planning.free_memory import free_bytes
device = find_device()
print(device.name, device, free_bytes(device), free_bytes(device))
"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="no C compiler")
def test_what_an_nvidia_gpu_has_free_is_asked_by_its_bus(tmp_path: Path) -> None:
    for name, code in LIBRARIES.items():
        source = tmp_path / f"{name}.c"
        source.write_text(code)
        run_process(["gcc", "-shared", "-fPIC", "-o", tmp_path / name, source], check=True)
    done = run_process(
        [sys.executable, "-c", ASK], env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    )
    assert done.stdout.split("\n")[0] == "Tesla T4 cuda sm75 15100000000 15100000000", done.stderr
