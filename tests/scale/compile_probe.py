"""Run in vLLM's Python: compile the layers of a checkpoint's blocks, and print what was seen.

    python compile_probe.py FOLDER BACKEND

The layers are vLLM's own, loaded by their own weight loaders; between them is what a Llama has,
without attention. Printed as JSON: `off_by`, between compiled and eager code; `compiles`, for
prompts of four lengths; `same_graph`, whether two blocks that are alike are one graph; `calls`, of
the operator in it; `named`, what in it names a layer; `operators`, all that eager code runs;
`waits`, those that wait for a device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from gptq_loader_extensions.vllm.layers.quantization import GPTQLoaderConfig

if TYPE_CHECKING:
    from collections.abc import Callable

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHARDS: dict[str, str | int] = {"q": "q", "k": "k", "v": "v", "gate": 0, "up": 1}
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


class Block(torch.nn.Module):
    """The linear layers of one of a Llama's blocks, as vLLM makes them."""

    def __init__(self, config: dict[str, int], quant: GPTQLoaderConfig, prefix: str) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        size = config.get("head_dim") or hidden // heads

        def options(name: str) -> dict[str, Any]:
            return {"bias": False, "quant_config": quant, "prefix": f"{prefix}.{name}"}

        self.qkv_proj = QKVParallelLinear(
            hidden, size, heads, kv_heads, **options("self_attn.qkv_proj")
        )
        self.split = self.qkv_proj.num_heads * size  # this worker's
        self.o_proj = RowParallelLinear(heads * size, hidden, **options("self_attn.o_proj"))
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner] * 2, **options("mlp.gate_up_proj")
        )
        self.down_proj = RowParallelLinear(inner, hidden, **options("mlp.down_proj"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.qkv_proj(x)
        attended, _ = self.o_proj(qkv[..., : self.split])
        x = x + attended
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        down, _ = self.down_proj(torch.nn.functional.silu(gate) * up)
        return x + down


class Watch(TorchDispatchMode):
    """Note the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


def main(folder: Path, backend: str) -> dict[str, Any]:
    options = {"gptq_loader": {"backend": backend}}
    vllm_config = VllmConfig(additional_config=options)
    with set_current_vllm_config(vllm_config):
        init_distributed_environment(1, 0, f"file://{Path.cwd() / 'store'}", 0, "gloo")
        initialize_model_parallel()
        blocks = load(folder)
        with torch.inference_mode(), set_forward_context(None, vllm_config, num_tokens=8):
            return watch(blocks, json.loads((folder / "config.json").read_text())["hidden_size"])


def load(folder: Path) -> torch.nn.ModuleList:
    """Make every block, and pass it its tensors as vLLM's model does."""
    config = json.loads((folder / "config.json").read_text())
    quant = GPTQLoaderConfig()
    quant.maybe_update_config(str(folder))
    quant.packed_modules_mapping = FUSED
    count = config["num_hidden_layers"]
    blocks = torch.nn.ModuleList(
        Block(config, quant, f"model.layers.{number}") for number in range(count)
    )
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            pass_on(blocks, name, tensors.get_tensor(name))
    for layer in blocks.modules():
        method = getattr(layer, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(layer)
    return blocks


def pass_on(blocks: torch.nn.ModuleList, name: str, tensor: torch.Tensor) -> None:
    words = name.split(".")  # model.layers.0.self_attn.q_proj.qweight
    if "_proj" not in name:
        return
    number, projection, part = int(words[2]), words[4].removesuffix("_proj"), words[5]
    fused = next((it for it, names in FUSED.items() if words[4] in names), words[4])
    parameter = getattr(getattr(blocks[number], fused), part, None)
    if parameter is not None:
        shard = () if projection not in SHARDS else (SHARDS[projection],)
        parameter.weight_loader(parameter, tensor, *shard)


def watch(blocks: torch.nn.ModuleList, hidden: int) -> dict[str, Any]:
    """Compile, compare, and watch eager code."""
    xs = [torch.randn(rows, hidden) for rows in (1, 5, 8, 33)]
    eager = [blocks[0](x) for x in xs]
    with Watch() as seen:
        blocks[0](xs[2])
    waits = [name for name in seen.operators if any(it in name for it in WAITS)]
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:  # which has no values: whatever would look at one is an error
        shape = tuple(blocks[0](fake.from_tensor(xs[2])).shape)
    assert shape == tuple(eager[2].shape)
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    for block in list(blocks)[:2]:
        torch._dynamo.reset()
        torch.compile(block, backend=keep, fullgraph=True)(xs[2])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(blocks[0], fullgraph=True, dynamic=True)
    off_by = max(float((compiled(x) - y).abs().max()) for x, y in zip(xs, eager, strict=True))
    return {
        "off_by": off_by,
        "compiles": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "same_graph": graphs[0] == graphs[1],
        "calls": graphs[0].count("gptq_loader.multiply_layer"),
        "operators": seen.operators,
        "waits": waits,
        "named": [word for word in ("layers.0", "layers_0") if word in graphs[0]],
    }


if __name__ == "__main__":
    answer = main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.write(f"ANSWER {json.dumps(answer)}\n")
