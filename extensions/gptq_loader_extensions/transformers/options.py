"""Read the options of `from_pretrained`: honour them, ignore them, or refuse them."""

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
# They hold anyway, or do not concern a GPTQ checkpoint.
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
    """Refuse what cannot be honoured; return the options that are the config's or the model's.

    Raises:
        OptionInvalid: an option cannot be honoured with a GPTQ checkpoint.
    """
    if args:
        raise OptionInvalid(
            "a GPTQ checkpoint takes no positional arguments for the model's class",
            hint="set them in a config and pass that: config=",
        )
    if refused := [option for option in REFUSED if kwargs.get(option)]:
        raise OptionInvalid(
            f"a GPTQ checkpoint cannot be loaded with {' or '.join(refused)}",
            hint="leave it out; device_map= spreads a model over several devices",
        )
    method = _method(kwargs.get("quantization_config"))
    if method not in ("gptq", "gptq_v2"):
        raise OptionInvalid(
            f"this checkpoint is quantised by GPTQ, and cannot be quantised again by {method}",
            hint="leave quantization_config out: the checkpoint's own is read",
        )
    known = {*HONOURED, *WITHOUT_EFFECT, *REFUSED}
    return {key: value for key, value in kwargs.items() if key not in known}


def read_config(
    cls: Any,  # noqa: ANN401 - a model's class
    folder: Path,
    config_option: object,
    others: dict[str, Any],
    *,
    name: str,
    translated: dict[str, Any] | None = None,
) -> PreTrainedConfig:
    """Return the config to build: the one that was passed, or the checkpoint's, with options set.

    Args:
        cls: the model's class.
        folder: the checkpoint's.
        config_option: the option `config`, or None.
        others: options that are the config's.
        name: the reference that the user typed.
        translated: the checkpoint's config in the names of `cls`, where it has others.

    Raises:
        OptionInvalid: the config has no such option.
    """
    from transformers import PreTrainedConfig

    others = dict(others)
    implementations = {
        key: others.pop(key)
        for key in ("attn_implementation", "experts_implementation")
        if others.get(key) is not None
    }
    config: PreTrainedConfig
    if isinstance(config_option, PreTrainedConfig):
        config = copy.deepcopy(config_option)
    elif translated is not None and config_option is None:
        config, others = cls.config_class.from_dict(translated, return_unused_kwargs=True, **others)
    else:
        source: Any = folder if config_option is None else config_option
        config, others = cls.config_class.from_pretrained(
            source, return_unused_kwargs=True, **others
        )
    if unknown := sorted(others):
        raise OptionInvalid(
            f"from_pretrained has no option {', '.join(unknown)}, and neither has the config",
            hint="check the spelling, or leave it out",
        )
    for key, value in implementations.items():
        setattr(config, f"_{key}", value)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # set anew, as the tensors say, once all is loaded
    config.name_or_path = name
    return config


def read_dtype(kwargs: Mapping[str, Any], requested: object) -> str | None:
    """Return the name of the requested dtype; None leaves it to the kernels.

    Args:
        kwargs: the options.
        requested: the dtype that the Auto class was given, which some versions do not pass on.
    """
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype") or requested
    return None if dtype in (None, "auto") else str(dtype)


def read_placement(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a load that place the model.

    Raises:
        OptionInvalid: the device map is of a kind that is not supported.
    """
    device_map = kwargs.get("device_map")
    limits = kwargs.get("max_memory")
    options: dict[str, Any] = {}
    if limits:
        options["max_memory"] = {_device(key): value for key, value in limits.items()}
    if kwargs.get("offload_folder") is not None:
        options["offload_folder"] = kwargs["offload_folder"]
    if device_map is None and not limits:
        return options
    if isinstance(device_map, dict):
        places = {key: _device(value) for key, value in device_map.items()}
        if set(places) == {""} and places[""] != "disk":
            return {"device": places[""], **options}
        return {"device_map": places, **options}
    if device_map is None or device_map in FILLING:
        return {"device_map": "auto", **options}
    if device_map == "balanced_low_0":
        raise OptionInvalid(
            'the device map "balanced_low_0" is not supported for GPTQ checkpoints',
            hint='write device_map="auto", and leave room on the first GPU: max_memory={0: "4GB"}',
        )
    return {"device": _device(device_map), **options}


def _device(device: object) -> str:
    """Return a device's name as `load` takes it; a number is a GPU's."""
    if isinstance(device, int):
        kind = torch.accelerator.current_accelerator()
        return f"{'cuda' if kind is None else kind.type}:{device}"
    return str(device)


def _method(config: Any) -> str:  # noqa: ANN401 - a table, or transformers' own
    if config is None:
        return "gptq"
    stored = config.get("quant_method") if isinstance(config, dict) else config.quant_method
    return str(getattr(stored, "value", stored) or "gptq").lower()
