"""Read the options of `from_pretrained`: honour them, pass them over, or refuse them in words."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_plugin.errors import OptionInvalid

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig

__all__ = ["check_options", "read_config", "read_dtype", "read_placement"]

# Read elsewhere in this package.
HONOURED = (
    "adapter_kwargs", "adapter_name", "cache_dir", "config", "device_map", "dtype",
    "force_download", "generation_config", "local_files_only", "max_memory", "offload_folder",
    "output_loading_info", "proxies", "quantization_config", "revision", "subfolder", "token",
    "torch_dtype",
)  # fmt: skip
# What they ask for is so anyway, or says nothing of a GPTQ checkpoint.
WITHOUT_EFFECT = (
    "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "allow_all_kernels",
    "code_revision", "disable_mmap", "from_flax", "from_tf", "gguf_file",
    "ignore_mismatched_sizes", "low_cpu_mem_usage", "mirror", "offload_buffers",
    "offload_state_dict", "state_dict", "tqdm_class", "trust_remote_code", "use_safetensors",
    "weights_only",
)  # fmt: skip
REFUSED = (
    "device_mesh", "distributed_config", "fusion_config", "kernel_config", "key_mapping",
    "tp_plan", "tp_size", "use_kernels", "variant",
)  # fmt: skip
FILLING = ("auto", "balanced", "sequential")


def check_options(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what cannot be honoured; give the options that are for the config or the model.

    Raises:
        OptionInvalid: an option asks for what cannot be done with a GPTQ checkpoint.
    """
    if args:
        raise OptionInvalid(
            "arguments for the model's own class are not handed on with a GPTQ checkpoint",
            hint="put what they say into a config, and hand that over: config=",
        )
    if refused := [it for it in REFUSED if kwargs.get(it)]:
        raise OptionInvalid(
            f"a GPTQ checkpoint is not loaded with {' or '.join(refused)}",
            hint="leave it out; device_map= spreads a model over several devices",
        )
    method = _method(kwargs.get("quantization_config"))
    if method not in ("gptq", "gptq_v2"):
        raise OptionInvalid(
            f"this checkpoint is quantised by GPTQ, and cannot be quantised by {method} again",
            hint="leave quantization_config out: the checkpoint's own is read",
        )
    known = {*HONOURED, *WITHOUT_EFFECT, *REFUSED}
    return {key: value for key, value in kwargs.items() if key not in known}


def read_config(
    cls: Any,  # noqa: ANN401 - a model's class
    folder: Path,
    given: object,
    others: dict[str, Any],
    *,
    name: str,
    translated: dict[str, Any] | None = None,
) -> PreTrainedConfig:
    """Give the config to build: the one that was handed over, or the checkpoint's, and options.

    Raises:
        OptionInvalid: an option is none of the config's.
    """
    from transformers import PreTrainedConfig

    others = dict(others)
    implementations = {
        key: others.pop(key)
        for key in ("attn_implementation", "experts_implementation")
        if others.get(key) is not None
    }
    config: PreTrainedConfig
    if isinstance(given, PreTrainedConfig):
        config = copy.deepcopy(given)
    elif translated is not None and given is None:
        config, others = cls.config_class.from_dict(translated, return_unused_kwargs=True, **others)
    else:
        source: Any = folder if given is None else given
        config, others = cls.config_class.from_pretrained(
            source, return_unused_kwargs=True, **others
        )
    if unknown := sorted(others):
        raise OptionInvalid(
            f"{', '.join(unknown)} is no option of from_pretrained and nothing in the config",
            hint="check its spelling, or leave it out",
        )
    for key, value in implementations.items():
        setattr(config, f"_{key}", value)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # set anew, as the tensors say, once all is loaded
    config.name_or_path = name
    return config


def read_dtype(kwargs: Mapping[str, Any], asked: object) -> str | None:
    """Give the dtype that was asked for by name, or None: the kernels then say.

    Args:
        kwargs: the options.
        asked: the dtype that the Auto class was given, which some versions do not hand on.
    """
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or asked
    return None if dtype in (None, "auto") else str(dtype)


def read_placement(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options of a load that say where the model goes.

    Raises:
        OptionInvalid: the device map is of a kind that is not known here.
    """
    wanted = kwargs.get("device_map")
    limits = kwargs.get("max_memory")
    placed: dict[str, Any] = {}
    if limits:
        placed["max_memory"] = {_device(key): value for key, value in limits.items()}
    if kwargs.get("offload_folder") is not None:
        placed["offload_folder"] = kwargs["offload_folder"]
    if wanted is None and not limits:
        return placed
    if isinstance(wanted, dict):
        where = {key: _device(value) for key, value in wanted.items()}
        if set(where) == {""} and where[""] != "disk":
            return {"device": where[""], **placed}
        return {"device_map": where, **placed}
    if wanted is None or wanted in FILLING:
        return {"device_map": "auto", **placed}
    if wanted == "balanced_low_0":
        raise OptionInvalid(
            'a device map "balanced_low_0" is not known for GPTQ checkpoints',
            hint='write device_map="auto", and leave room on the first GPU: max_memory={0: "4GB"}',
        )
    return {"device": _device(wanted), **placed}


def _device(device: object) -> str:
    """Write a device as we name it: a number is a GPU's."""
    if isinstance(device, int):
        kind = torch.accelerator.current_accelerator()
        return f"{'cuda' if kind is None else kind.type}:{device}"
    return str(device)


def _method(config: Any) -> str:  # noqa: ANN401 - a table, or transformers' own
    if config is None:
        return "gptq"
    stored = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(stored, "value", stored) or "gptq").lower()
