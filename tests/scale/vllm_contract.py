"""Run in vLLM's Python: compare vLLM with everything of it that this package uses.

    python vllm_contract.py FOLDER [EXPECTED...]

FOLDER is that of gptq_loader_extensions/vllm, whose imports of vLLM are read from its files. What
else is used is listed here: arguments, attributes, options, variables and texts. Each thing that is
missing is printed as a line `MISSING ...`; EXPECTED are more attributes to look for, as
`module:Class.attribute`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LINEAR = "vllm.model_executor.layers.linear"
EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"
QUANTIZATION = "vllm.model_executor.layers.quantization"
OURS = "gptq_loader_extensions.vllm.layers"

# What our code calls, and the arguments by which it does.
CALLS = {
    "vllm.config:get_current_vllm_config": (),
    "vllm.distributed:get_pp_group": (),
    "vllm.forward_context:get_forward_context": (),
    "vllm.model_executor.model_loader.weight_utils:download_weights_from_hf": (
        "model_name_or_path",
        "cache_dir",
        "allow_patterns",
        "revision",
    ),
    "vllm.model_executor.models.utils:WeightsMapper.map_name": ("self", "key"),
    f"{QUANTIZATION}:register_quantization_config": ("quantization",),
    f"{QUANTIZATION}.auto_gptq:AutoGPTQConfig.from_config": ("config",),
    f"{FUSED_MOE}:RoutedExperts._map_global_expert_id_to_local_expert_id": ("self", "expert_id"),
    f"{FUSED_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod.__init__": ("self", "moe"),
    "vllm.utils.torch_utils:_encode_layer_name": ("layer_name",),
    "vllm.utils.torch_utils:_resolve_layer_name": ("layer_name",),
}
# What vLLM calls of ours: by these arguments, or by more that ours takes as **.
METHODS = {
    f"{OURS}.quantization:GPTQLoaderConfig": f"{QUANTIZATION}.base_config:QuantizationConfig",
    f"{OURS}.linear:GPTQLoaderLinearMethod": f"{LINEAR}:LinearMethodBase",
    f"{OURS}.experts:GPTQLoaderExpertsMethod": (
        f"{FUSED_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod"
    ),
}
OWN = ("multiply",)  # public methods of ours that vLLM has none of
# All public methods of the base classes: a new one has a default, which may be wrong for us, as
# the one that drops every g_idx was.
KNOWN = {
    f"{QUANTIZATION}.base_config:QuantizationConfig": {
        "apply_vllm_mapper",
        "from_config",
        "get_cache_scale_mapper",
        "get_checkpoint_weight_mapper",
        "get_config_filenames",
        "get_from_keys",
        "get_from_keys_or",
        "get_min_capability",
        "get_name",
        "get_quant_method",
        "get_supported_act_dtypes",
        "maybe_update_config",
        "override_quantization_method",
    },
    f"{LINEAR}:LinearMethodBase": {
        "apply",
        "create_weights",
        "dequantize_weight",
        "embedding",
        "process_weights_after_loading",
        "tie_weights",
    },
}
# Attributes of vLLM's objects: of the class, an annotation in it, or set by one of its methods.
ATTRIBUTES = {
    f"{LINEAR}:LinearBase": {"tp_rank", "tp_size", "quant_method"},
    f"{LINEAR}:QKVParallelLinear": {
        "head_size",
        "num_kv_head_replicas",
        "total_num_heads",
        "total_num_kv_heads",
        "v_head_size",
    },
    f"{LINEAR}:RowParallelLinear": {"input_size_per_partition"},
    f"{EMBEDDING}:ParallelLMHead": {"org_vocab_size", "shard_indices", "tp_rank", "tp_size"},
    f"{EMBEDDING}:VocabParallelEmbeddingShardIndices": {
        "org_vocab_start_index",
        "org_vocab_end_index",
    },
    f"{FUSED_MOE}:RoutedExperts": {
        "ckpt_down_proj_name",
        "ckpt_gate_proj_name",
        "ckpt_up_proj_name",
        "global_num_experts",
        "layer_name",
        "moe_config",
    },
    f"{FUSED_MOE}.config:FusedMoEConfig": {
        "intermediate_size_per_partition",
        "intermediate_size_per_partition_unpadded",
        "tp_rank",
        "tp_size",
    },
    f"{FUSED_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod": {"moe", "supports_eplb"},
    f"{QUANTIZATION}.base_config:QuantizationConfig": {"packed_modules_mapping"},
    f"{QUANTIZATION}:": {"QUANTIZATION_METHODS"},
    "vllm.config:VllmConfig": {"additional_config", "compilation_config", "load_config"},
    "vllm.config:CompilationConfig": {"static_forward_context"},
    "vllm.config:LoadConfig": {"download_dir"},
    "vllm.forward_context:ForwardContext": {"no_compile_layers"},
    "vllm.platforms.interface:Platform": {"is_cpu"},
    "vllm.distributed.parallel_state:GroupCoordinator": {"world_size"},
    "vllm.model_executor.models.utils:WeightsMapper": {"apply", "__or__"},
}
# By these arguments vLLM's models load the parameters of experts, and so ours.
LOADER = (
    f"{FUSED_MOE}:RoutedExperts.weight_loader",
    ("self", "param", "loaded_weight", "weight_name", "shard_id", "expert_id", "return_success"),
)
FLAGS = (
    "additional_config",
    "chat_template",
    "disable_access_log_for_endpoints",
    "dtype",
    "enforce_eager",
    "generation_config",
    "host",
    "max_model_len",
    "max_num_seqs",
    "middleware",
    "model",
    "port",
    "quantization",
    "served_model_name",
    "shutdown_timeout",
    "tensor_parallel_size",
    "tokenizer",
)
VARIABLES = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_PLUGINS")
# Texts in a file under vllm/: routes, and what `gptq-loader serve` reads in the log.
TEXTS = {
    "entrypoints/serve/instrumentator/health.py": '@router.get("/health"',
    "model_executor/layers/quantization/auto_gptq.py": "Using %s for AutoGPTQLinearMethod",
    "model_executor/models/utils.py": "mapper |= quant_config.get_checkpoint_weight_mapper()",
    "logger.py": '"pid=%(process)d) %(levelname)s %(asctime)s "',
    "plugins/__init__.py": '"vllm.general_plugins"',
}
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def main(folder: Path, expected: Iterable[str]) -> None:
    for problem in problems(folder, expected):
        sys.stdout.write(f"MISSING {problem}\n")
    import vllm

    sys.stdout.write(f"CHECKED vLLM {vllm.__version__}\n")


def problems(folder: Path, expected: Iterable[str]) -> Iterator[str]:
    yield from _imports(folder)
    for name, arguments in [*CALLS.items(), LOADER]:
        yield from _call(name, arguments)
    for ours, base in METHODS.items():
        yield from _methods(ours, base)
    for name, known in KNOWN.items():
        for method in sorted(_public(_find(name)) - known):
            yield f"a decision about {name}.{method}, which is new: is its default right for us?"
    wanted = [f"{name}.{it}" for name, its in ATTRIBUTES.items() for it in sorted(its)]
    for name in [*wanted, *expected]:
        owner, _, attribute = name.rpartition(".")
        if not _has(_find(owner), attribute):
            yield f"{name}: {attribute} is no attribute"
    yield from _texts()


def _imports(folder: Path) -> Iterator[str]:
    """Compare with every import of vLLM in our files."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("vllm"):
                continue
            for alias in node.names:
                if not _is_importable(str(node.module), alias.name):
                    where = f"{file.relative_to(folder)}:{node.lineno}"
                    yield f"{node.module}:{alias.name}, imported in {where}"


def _is_importable(module: str, name: str) -> bool:
    try:
        if hasattr(importlib.import_module(module), name):
            return True
        return importlib.util.find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("vllm"):
            return False
    # another version's module may need packages that are not here: its text says what it defines
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return False
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return any(isinstance(node, Definition) and node.name == name for node in tree.body)


def _call(name: str, arguments: tuple[str, ...]) -> Iterator[str]:
    try:
        found = tuple(inspect.signature(_find(name)).parameters.values())
    except (AttributeError, ModuleNotFoundError):
        yield name
        return
    names = tuple(it.name for it in found)
    required = {it.name for it in found if it.default is it.empty and it.kind < it.VAR_POSITIONAL}
    if names[: len(arguments)] != arguments or required - set(arguments):
        yield f"{name}({', '.join(arguments)}): its arguments are now ({', '.join(names)})"


def _methods(ours: str, base: str) -> Iterator[str]:
    """Compare our methods with those that they override."""
    mine, theirs = _find(ours), _find(base)
    if mine.__bases__ != (theirs,):
        yield f"{ours}: its base is no longer {base}"
    for method in sorted(getattr(mine, "__abstractmethods__", ())):
        yield f"{ours}.{method}, which vLLM requires"
    for name in sorted(set(vars(mine)) & _public(mine) - set(OWN)):
        if not hasattr(theirs, name):
            yield f"{base}.{name}, which ours overrides"
            continue
        if not callable(getattr(mine, name)):
            continue
        passed = inspect.signature(getattr(theirs, name)).parameters.values()
        taken = inspect.signature(getattr(mine, name)).parameters
        more = any(it.kind == it.VAR_KEYWORD for it in taken.values())
        named = [it.name for it in passed if it.kind not in (it.VAR_KEYWORD, it.VAR_POSITIONAL)]
        for argument in named:
            if argument not in taken and not more:
                yield f"{ours}.{name}: the argument {argument}, which {base} has"


def _texts() -> Iterator[str]:
    import vllm
    from vllm import envs

    package = Path(str(vllm.__file__)).parent
    for flag in sorted(set(FLAGS) - _flags(package)):
        yield f"the option --{flag.replace('_', '-')} of vLLM's server"
    for variable in sorted(set(VARIABLES) - set(envs.environment_variables)):
        yield f"the environment variable {variable}"
    for name, text in TEXTS.items():
        file = package / name
        if not file.is_file() or text not in file.read_text(encoding="utf-8"):
            yield f"the text {text} in vllm/{name}"


def _flags(package: Path) -> set[str]:
    """List the options of vLLM's server: the fields of its engine's and of its own arguments."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    flags = set(AsyncEngineArgs.__dataclass_fields__)
    for file in (package / "entrypoints").rglob("cli_args.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and node.name.endswith("FrontendArgs"):
                flags |= {
                    ast.unparse(it.target) for it in node.body if isinstance(it, ast.AnnAssign)
                }
    return flags


def _find(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split(".") if path else ():
        found = getattr(found, part)
    return found


def _public(owner: type) -> set[str]:
    return {name for name in dir(owner) if not name.startswith("_") and _is_method(owner, name)}


def _is_method(owner: type, name: str) -> bool:
    static = inspect.getattr_static(owner, name)
    return callable(static) or isinstance(static, (classmethod, staticmethod, property))


def _has(owner: Any, attribute: str) -> bool:
    if hasattr(owner, attribute):
        return True
    if not isinstance(owner, type):
        return False
    return any(attribute in _set_in(it) for it in owner.__mro__ if it.__module__.startswith("vllm"))


def _set_in(owner: type) -> set[str]:
    """List the attributes that a class annotates, or sets in its methods."""
    found = set(getattr(owner, "__annotations__", ()))
    for node in ast.walk(ast.parse(Path(inspect.getfile(owner)).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == owner.__name__:
            for it in ast.walk(node):
                if isinstance(it, ast.Attribute) and ast.unparse(it.value) == "self":
                    found |= {it.attr} if isinstance(it.ctx, ast.Store) else set()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
