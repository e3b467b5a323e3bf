"""Load a GPTQ checkpoint for `from_pretrained`, and return what it returns."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, Any

import torch

from gptq_loader_extensions.transformers.detect import fetch
from gptq_loader_extensions.transformers.linear import present_as_linear
from gptq_loader_extensions.transformers.options import (
    check_options,
    read_config,
    read_dtype,
    read_placement,
)
from gptq_loader_extensions.transformers.quantizer import QuantizationConfig, Quantizer
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.loading import load_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from gptq_loader_extensions.transformers.detect import CheckpointSource
    from gptq_loader_plugin.model.build import FilledModel
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["can_load", "load_checkpoint"]

logger = logging.getLogger(__name__)


def can_load(cls: Any, source: CheckpointSource) -> bool:  # noqa: ANN401 - a model's class
    """Return whether `cls` is a class whose GPTQ checkpoints are loaded here.

    That is one that generates text from text, or its body. Any other is left to transformers
    where transformers recognises the checkpoint as GPTQ.

    Raises:
        OptionInvalid: transformers would treat the checkpoint as an unquantised one.
    """
    if _causal_lm_class(cls) is not None:
        return True
    if source.known:
        return False
    raise OptionInvalid(
        f"{source.name} is a GPTQ checkpoint, and {cls.__name__} does not generate text",
        hint="load it with AutoModelForCausalLM",
    )


def load_checkpoint(
    cls: Any,  # noqa: ANN401 - a model's class
    source: CheckpointSource,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    requested_dtype: object,
) -> Any:  # noqa: ANN401 - a model, or a model and what was loaded
    """Load the checkpoint as `cls.from_pretrained` would.

    Args:
        cls: the model's class.
        source: the checkpoint.
        args: arguments beyond the name.
        kwargs: the options.
        requested_dtype: the dtype that the Auto class was given.

    Raises:
        GPTQLoaderError: the checkpoint cannot be loaded, or not with these options.
    """
    config_options = check_options(args, kwargs)
    dtype, placement = read_dtype(kwargs, requested_dtype), read_placement(kwargs)
    folder = fetch(source)
    config = read_config(
        cls,
        folder,
        kwargs.get("config"),
        config_options,
        name=source.name,
        translated=source.translated,
    )
    causal_lm = _causal_lm_class(cls)
    filled = load_model(
        folder,
        LoadOptions(dtype=dtype, **placement),
        reference=source.name,
        config=config,
        model_class=cls if causal_lm is not None and issubclass(cls, causal_lm) else None,
    )
    for warning in filled.warnings:
        logger.warning("%s: %s", source.name, warning)
    model = _finish(filled)
    if kwargs.get("device_map") is not None:
        model.hf_device_map = _device_map(filled.plan)
    if kwargs.get("generation_config") is not None:
        model.generation_config = kwargs["generation_config"]
    _add_adapter(model, kwargs)
    if causal_lm is not None and not issubclass(cls, causal_lm):
        body: Any = model.base_model
        _mark(body, model.hf_quantizer)
        model = body
    if kwargs.get("output_loading_info"):
        info: dict[str, Any] = {
            key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        return model, {**info, "error_msgs": []}
    return model


def _device_map(plan: Plan) -> dict[str, str]:
    """Return where the model's parts are, as transformers' device maps have it."""
    device_map = {key: place.name for key, place in plan.placed.items()}
    if len(set(device_map.values())) > 1:
        return device_map
    return {"": next(iter(device_map.values()), plan.device.torch_name)}


def _causal_lm_class(cls: Any) -> Any:  # noqa: ANN401
    """Return the class that generates text, where `cls` is one or the body of one; else None."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    config_class = cls.config_class
    if config_class is None or config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    causal_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    if issubclass(cls, causal_lm):
        return causal_lm
    return causal_lm if cls is MODEL_MAPPING.get(config_class, None) else None


def _finish(filled: FilledModel) -> Any:  # noqa: ANN401
    """Present the model to transformers, PEFT and Trainer as a quantised one."""
    model: Any = filled.model
    quantizer = Quantizer(QuantizationConfig.of(filled.plan.config), filled=filled)
    for choice in filled.plan.choices:
        layer = choice.layer
        present_as_linear(
            filled.modules[layer.name],
            shape=(layer.out_features, layer.in_features),
            dtype=model.dtype,
            device=torch.device(filled.plan.place(layer.name).device.torch_name),
            read_weight=functools.partial(quantizer.read_weight, layer.name),
        )
    model.config.quantization_config = quantizer.quantization_config
    _mark(model, quantizer)
    return model


def _mark(model: Any, quantizer: Quantizer) -> None:  # noqa: ANN401
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.config._is_quantized = True  # noqa: SLF001 - transformers' own mark


def _add_adapter(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> None:
    """Put an adapter on the model where transformers has resolved the name to an adapter's."""
    options = dict(kwargs.get("adapter_kwargs") or {})
    path = options.pop("_adapter_model_path", None)
    if path is not None:
        name = kwargs.get("adapter_name") or "default"
        model.load_adapter(path, adapter_name=name, adapter_kwargs=options)
