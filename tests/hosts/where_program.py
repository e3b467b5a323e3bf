"""Ask an engine's own code whether it takes checkpoints.

    python where_program.py ENGINE < checkpoints.json

Run by the Python of the environment `engines`, or of vLLM's. Reads a list of checkpoints, each
{folder, config, layers}: config is what the engine reads, or null; a layer has name, rows, columns,
groups, and the shapes of its tensors. Prints a line ANSWERS with a list, "" where the engine takes
the checkpoint and else what it raised or said.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path


def vllm(checkpoint):
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        MARLIN_SUPPORTED_GROUP_SIZES,
    )

    config = vllm_config(checkpoint, AutoGPTQConfig)
    assert config.group_size in MARLIN_SUPPORTED_GROUP_SIZES, f"group size {config.group_size}"
    check_groups(config.group_size, checkpoint)


def vllm_cpu(checkpoint):
    import torch
    from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
    from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
        MPLinearLayerConfig,
    )
    from vllm.model_executor.layers.quantization.auto_gptq import (
        AutoGPTQConfig,
        AutoGPTQLinearMethod,
    )

    config = vllm_config(checkpoint, AutoGPTQConfig)
    AutoGPTQLinearMethod(config)
    check_groups(config.group_size, checkpoint)
    for layer in checkpoint["layers"]:
        shape = (layer["rows"], layer["columns"])
        asked = MPLinearLayerConfig(
            full_weight_shape=shape,
            partition_weight_shape=shape,
            weight_type=config.quant_type,
            act_type=torch.bfloat16,
            group_size=config.group_size,
            zero_points=False,
        )
        able, reason = CPUWNA16LinearKernel.can_implement(asked)
        assert able, reason


def vllm_config(checkpoint, kind):
    assert checkpoint["config"] is not None, "no quantization config"
    assert kind.override_quantization_method(checkpoint["config"], None) is not None, "no method"
    return kind.from_config(checkpoint["config"])


def check_groups(group_size, checkpoint):
    """Compare the rows of scales that an engine makes room for with those that are there."""
    for layer in checkpoint["layers"]:
        size = layer["rows"] if group_size == -1 else group_size
        assert layer["rows"] // size == layer["groups"], f"scales of {layer['name']}"


def humming(checkpoint):
    import torch
    from humming.schema import BaseWeightSchema

    schema = BaseWeightSchema.from_config(checkpoint["config"])
    schema.to_humming_schema(torch.float16)
    for layer in checkpoint["layers"]:
        wanted = schema.get_tensors_attrs(layer["columns"], layer["rows"], torch.float16)
        for part, shape in layer["shapes"].items():
            assert list(wanted[part]["shape"]) == shape, f"{layer['name']}.{part}"


def sglang(checkpoint):
    found = sglang_names("gptq/gptq.py", {"TYPE_MAP"})
    groups = sglang_names("marlin_utils.py", {"MARLIN_SUPPORTED_GROUP_SIZES"})
    config = checkpoint["config"]
    assert (config or {}).get("quant_method") == "gptq", "no method"
    kinds = [ast.literal_eval(key) for key in found["TYPE_MAP"].keys]
    kind = (config["bits"], config["sym"])
    # anything else is for the class GPTQConfig, whose kernel raises
    source = sglang_file("gptq/schemes/gptq_linear.py").read_text()
    assert "The non-Marlin GPTQ CUDA kernel has been removed" in source, "it has a kernel again"
    assert kind in kinds, f"{kind} has no kernel"
    sizes = ast.literal_eval(groups["MARLIN_SUPPORTED_GROUP_SIZES"])
    assert config["group_size"] in sizes, f"group size {config['group_size']}"
    columns = ast.literal_eval(
        sglang_names("marlin_utils.py", {"GPTQ_MARLIN_MIN_THREAD_N"})["GPTQ_MARLIN_MIN_THREAD_N"]
    )
    assert all(it["columns"] % columns == 0 for it in checkpoint["layers"]), "columns"
    check_groups(config["group_size"], checkpoint)


def sglang_cpu(checkpoint):
    """Run SGLang's own check, and what create_weights divides by, from its file."""
    from types import SimpleNamespace

    tree = ast.parse(sglang_file("gptq/schemes/gptq_cpu.py").read_text())
    check = next(it for it in tree.body if getattr(it, "name", "") == "_check_cpu_amx_support")
    names = {"GPTQConfig": object}
    exec(compile(ast.Module([check], []), "gptq_cpu.py", "exec"), names)
    stated = checkpoint["config"]
    assert (stated or {}).get("quant_method") == "gptq", "no method"
    config = SimpleNamespace(
        weight_bits=stated["bits"],
        desc_act=stated["desc_act"],
        checkpoint_format=stated.get("checkpoint_format", ""),
        true_sequential=stated.get("true_sequential", False),
        static_groups=stated.get("static_groups", False),
    )
    names["_check_cpu_amx_support"](config)
    check_groups(stated["group_size"], checkpoint)


def sglang_file(name):
    package = Path(importlib.util.find_spec("sglang").submodule_search_locations[0])
    return package / "srt" / "layers" / "quantization" / name


def sglang_names(name, wanted):
    tree = ast.parse(sglang_file(name).read_text())
    return {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id in wanted
    }


def transformers(checkpoint):
    from optimum.gptq import GPTQQuantizer
    from transformers.utils.quantization_config import GPTQConfig

    config = checkpoint["config"]
    assert (config or {}).get("quant_method") == "gptq", "no method"
    quantizer = GPTQQuantizer.from_dict(GPTQConfig.from_dict(config).to_dict_optimum())
    quantizer.select_quant_linear(device_map={"": "cpu"})
    check_kernels([quantizer.quant_linear], quantizer, checkpoint)


def gptqmodel(checkpoint):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import METHOD, QuantizeConfig
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    config = QuantizeConfig.from_pretrained(checkpoint["folder"])
    kernel = hf_select_quant_linear_v2(
        bits=config.bits,
        group_size=config.group_size,
        desc_act=config.desc_act,
        sym=config.sym,
        format=config.format,
        quant_method=METHOD.GPTQ,
        pack=False,
        device_map={"": "cpu"},
        backend="auto",
    )
    # where the first one raises, GPTQModel goes on to the next; this is its last
    check_kernels([kernel, TorchLinear], config, checkpoint)


def check_kernels(kernels, config, checkpoint):
    import torch

    for layer in checkpoint["layers"]:
        answers = [
            kernel.validate(
                bits=config.bits,
                group_size=config.group_size,
                desc_act=config.desc_act,
                sym=config.sym,
                in_features=layer["rows"],
                out_features=layer["columns"],
                pack_dtype=torch.int32,
            )
            for kernel in kernels
        ]
        assert any(able for able, _ in answers), str(answers[0][1])


def auto_round(checkpoint):
    from auto_round.inference.backend import BackendInfos, check_compatible
    from transformers import AutoRoundConfig

    stated = checkpoint["config"]
    assert "gptq" in stated["quant_method"], "another method"
    AutoRoundConfig.from_dict(dict(stated))
    scheme = {"data_type": "int", **{key: stated[key] for key in ("bits", "group_size", "sym")}}
    own = [it for it in BackendInfos if it.startswith("auto_round") and not it.endswith(":fake")]
    for layer in checkpoint["layers"]:
        assert any(
            check_compatible(
                name, device, scheme, "auto_round:auto_gptq", layer["rows"], layer["columns"],
                check_requirements=False,
            )
            for name in own
            for device in ("cpu", "cuda")
        ), f"no kernel for {layer['name']}"  # fmt: skip


def ktransformers(checkpoint):
    from kt_kernel.utils.loader import GPTQSafeTensorLoader

    loader = GPTQSafeTensorLoader(checkpoint["folder"])
    experts = next(it["name"] for it in checkpoint["layers"] if ".experts." in it["name"])
    loader.load_experts(experts.partition(".mlp.experts.")[0].partition(".block_sparse_moe")[0])
    assert checkpoint["config"]["bits"] == 4, "GPTQ_INT4 is 4 bits"


def mlx_lm(checkpoint):
    import mlx.core as mx
    from mlx_lm.utils import _transform_awq_weights

    weights = {}
    for file in Path(checkpoint["folder"]).glob("*.safetensors"):
        weights |= mx.load(str(file))
    made, _ = _transform_awq_weights(weights, checkpoint["config"])
    for layer in checkpoint["layers"]:
        shape = (layer["columns"], layer["rows"] // 8)
        assert made[f"{layer['name']}.weight"].shape == shape, "AWQ's shapes"


ENGINES = {
    "auto-round": auto_round,
    "gptqmodel": gptqmodel,
    "ktransformers": ktransformers,
    "mlx-lm": mlx_lm,
    "sglang": sglang,
    "sglang-cpu": sglang_cpu,
    "transformers": transformers,
    "vllm": vllm,
    "vllm+humming": humming,
    "vllm-cpu": vllm_cpu,
}


def main():
    ask = ENGINES[sys.argv[1]]
    answers = []
    for checkpoint in json.load(sys.stdin):
        try:
            ask(checkpoint)
            answers.append("")
        except Exception as error:  # noqa: BLE001 - whatever the engine raises is its answer
            answers.append(f"{type(error).__name__}: {error}")
    print("ANSWERS " + json.dumps(answers))


if __name__ == "__main__":
    main()
