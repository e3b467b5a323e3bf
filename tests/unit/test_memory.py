"""A load takes little more memory than the checkpoint has bytes, where layers stay packed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from altered import CPU_KERNELS, DATA, NAMES, copy, plugins, set_field
from processes import run_process
from safetensors.torch import save_file

import gptq_loader_plugin as gptq
from gptq_loader_plugin.kernel import TopLogitsHead

ROOT = Path(__file__).parents[2]
MOST = 1.1  # times the checkpoint's bytes; 1.02 for seven billion weights
FIXED = 6_000_000  # bytes, whatever the size: modules, tokenizer, a forward pass


def random_layer(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Four-bit codes at random, in act-order."""
    groups = rows // 128
    return {
        f"{name}.qweight": torch.randint(-(2**31), 2**31, (rows // 8, columns), dtype=torch.int32),
        f"{name}.qzeros": torch.full((groups, columns // 8), 0x77777777, dtype=torch.int32),
        f"{name}.scales": torch.full((groups, columns), 1e-3, dtype=torch.float16),
        f"{name}.g_idx": (torch.arange(rows) // 128)[torch.randperm(rows)].to(torch.int32),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/smaps_rollup")
def test_peak_memory_of_a_load(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=2048, max_position_embeddings=64,
    )  # fmt: skip
    tiny = "gptq-4bit-32g-act-sym"
    copy(tiny, tmp_path)
    set_field(tmp_path, group_size=128)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tensors = {}
    for name, tensor in model.state_dict().items():
        if ".layers." in name and tensor.dim() == 2:
            tensors |= random_layer(name.removesuffix(".weight"), *reversed(tensor.shape))
        else:
            tensors[name] = torch.ones(tensor.shape, dtype=torch.float16) / 8
    save_file(tensors, tmp_path / "model.safetensors")
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size > 40_000_000
    command = [sys.executable, ROOT / "bench" / "memory.py", tmp_path, "--json"]
    completed = run_process(command, check=True)
    found = json.loads(completed.stdout)
    assert set(found["kernels"]) == {CPU_KERNELS[0]}
    assert found["checkpoint"] == size
    assert found["peak"] <= MOST * size + FIXED, f"{found['peak'] / size:.2f} times its bytes"


def held(model: torch.nn.Module) -> int:
    """Count the bytes of all storages a model holds, each once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {it.untyped_storage().data_ptr(): it.untyped_storage().nbytes() for it in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", [*CPU_KERNELS, "dense", "reference"])
def test_what_is_planned_is_what_is_taken(name: str, backend: str) -> None:
    try:
        plan = gptq.explain(DATA / name, device="cpu", backend=backend, plugins=plugins())
    except gptq.NoBackend as refused:
        pytest.skip(next(it.reason for it in refused.declined if it.kernel == backend))
    with gptq.load(DATA / name, device="cpu", backend=backend, plugins=plugins()) as loaded:
        head = loaded.model.get_output_embeddings()
        copied = head.extra_bytes if isinstance(head, TopLogitsHead) else 0
        assert plan.weight_bytes == pytest.approx(held(loaded.model) + copied, rel=0.03)
        loaded.generate("Hi", gptq.GenerateOptions(max_new_tokens=3))
        ((_, kept, _),) = loaded._cache._kept
        rooms = [layer.room for layer in kept.layers]
        # what a position takes; the cache keeps room for a quarter more of them than it holds
        taken = sum(room.nbytes / room.shape[3] for room in rooms)
        assert plan.kv_bytes_per_token == taken
