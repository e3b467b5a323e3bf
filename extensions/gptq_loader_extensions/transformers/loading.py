"""Load a GPTQ checkpoint that `from_pretrained` was given, and give what it gives."""

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
from gptq_loader_extensions.transformers.quantizer import Quantizer, StoredConfig
from gptq_loader_plugin.errors import OptionInvalid
from gptq_loader_plugin.load_options import LoadOptions
from gptq_loader_plugin.loading import load_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

    from gptq_loader_extensions.transformers.detect import Found
    from gptq_loader_plugin.model.build import FilledModel
    from gptq_loader_plugin.planning.plan import Plan

__all__ = ["load_found", "takes"]

logger = logging.getLogger(__name__)


def takes(cls: Any, found: Found) -> bool:  # noqa: ANN401 - a model's class
    """Say whether `cls` is a class whose GPTQ checkpoints are loaded here.

    That is one that generates text from text, or its body. Another one is left to transformers
    where transformers knows the checkpoint for what it is.

    Raises:
        OptionInvalid: transformers would take the checkpoint for an unquantised one.
    """
    if _generating(cls) is not None:
        return True
    if found.known:
        return False
    raise OptionInvalid(
        f"{found.name} is a GPTQ checkpoint, and {cls.__name__} is no class for generating text",
        hint="load it with AutoModelForCausalLM",
    )


def load_found(
    cls: Any,  # noqa: ANN401 - a model's class
    found: Found,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    asked_dtype: object,
) -> Any:  # noqa: ANN401 - a model, or a model and what was loaded
    """Load the checkpoint as `cls.from_pretrained` is asked to.

    Args:
        cls: the model's class.
        found: the checkpoint.
        args: arguments beyond the name.
        kwargs: the options.
        asked_dtype: the dtype that the Auto class was given.

    Raises:
        GPTQLoaderError: the checkpoint cannot be loaded, or not in this way.
    """
    others = check_options(args, kwargs)
    dtype, placement = read_dtype(kwargs, asked_dtype), read_placement(kwargs)
    folder = fetch(found)
    config = read_config(
        cls,
        folder,
        kwargs.get("config"),
        others,
        name=found.name,
        translated=found.translated,
    )
    generating = _generating(cls)
    filled = load_model(
        folder,
        LoadOptions(dtype=dtype, **placement),
        reference=found.name,
        config=config,
        model_class=cls if generating is not None and issubclass(cls, generating) else None,
    )
    for warning in filled.warnings:
        logger.warning("%s: %s", found.name, warning)
    model = _finished(filled)
    if kwargs.get("device_map") is not None:
        model.hf_device_map = _places(filled.plan)
    if kwargs.get("generation_config") is not None:
        model.generation_config = kwargs["generation_config"]
    _add_adapter(model, kwargs)
    if generating is not None and not issubclass(cls, generating):
        body: Any = model.base_model
        _mark(body, model.hf_quantizer)
        model = body
    if kwargs.get("output_loading_info"):
        nothing: dict[str, Any] = {
            key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        }
        return model, {**nothing, "error_msgs": []}
    return model


def _places(plan: Plan) -> dict[str, str]:
    """Say where the model's parts are, as transformers' device maps do."""
    places = {key: it.name for key, it in plan.placed.items()}
    if len(set(places.values())) > 1:
        return places
    return {"": next(iter(places.values()), plan.device.torch_name)}


def _generating(cls: Any) -> Any:  # noqa: ANN401
    """Find the class that generates text, where `cls` is one or the body of one; else None."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    config_class = cls.config_class
    if config_class is None or config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    generating: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    if issubclass(cls, generating):
        return generating
    return generating if cls is MODEL_MAPPING.get(config_class, None) else None


def _finished(filled: FilledModel) -> Any:  # noqa: ANN401
    """Make the model what transformers, PEFT and Trainer know for a quantised one."""
    model: Any = filled.model
    quantizer = Quantizer(StoredConfig.of(filled.plan.config), filled=filled)
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
    """Put an adapter on the model where transformers found that the name was an adapter's."""
    options = dict(kwargs.get("adapter_kwargs") or {})
    path = options.pop("_adapter_model_path", None)
    if path is not None:
        name = kwargs.get("adapter_name") or "default"
        model.load_adapter(path, adapter_name=name, adapter_kwargs=options)
