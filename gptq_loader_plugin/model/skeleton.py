"""Make a transformers model without weights.

The parameters are on the meta device, and the buffers (rotary frequencies and such) computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptq_loader_plugin.checkpoint.transformers_config import (
    UNBUILDABLE,
    read_config,
    unknown_model,
)
from gptq_loader_plugin.checkpoint.vocabulary import fit_vocabulary
from gptq_loader_plugin.errors import UnsupportedFormat
from gptq_loader_plugin.model.meta import MetaDevice, empty_parameters
from gptq_loader_plugin.model.pictures import auto_class, drop_towers, reads_pictures

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from gptq_loader_plugin.checkpoint.reader import Checkpoint

__all__ = ["build_skeleton"]


def build_skeleton(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    config: PreTrainedConfig | None = None,
    model_class: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """Build the checkpoint's model: parameters on the meta device, buffers computed.

    Args:
        checkpoint: its config.json says what to build.
        dtype: the dtype its parameters will have.
        config: what to build instead of what config.json says.
        model_class: the class to build; None takes transformers' own for the config.

    Raises:
        ConfigInvalid: config.json is missing or broken.
        UnsupportedFormat: transformers does not know the model, or it needs code of its own.
    """
    model_type = checkpoint.model_config["model_type"]
    path = checkpoint.folder / "config.json"
    config = read_config(checkpoint) if config is None else config
    fit_vocabulary(config, checkpoint.headers)
    try:
        model = _build(config, dtype, model_class)
        _settle_buffers(model, config, dtype, model_class)
    except (*UNBUILDABLE, RuntimeError) as error:
        raise unknown_model(model_type, path, error) from error
    if model_class is None:
        _check_token_by_token(model, path)
    empty_parameters(model)
    parts = [getattr(model.config, name) for name in model.config.sub_configs]
    for part in (model.config, *(part for part in parts if part is not None)):
        part.dtype = dtype
    model.eval()
    return model


def _check_token_by_token(model: PreTrainedModel, path: Path) -> None:
    """Refuse a class without transformers' own `generate`: it denoises blocks, or moves a robot."""
    from transformers import GenerationMixin

    if not isinstance(model, GenerationMixin):
        raise UnsupportedFormat(
            f"a {type(model).__name__} does not go on with a text token by token",
            path=path,
            hint="use a model for text generation, or this one unquantised and by transformers' "
            "own code for it",
        )


def _build(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    model_class: type[PreTrainedModel] | None,
    *,
    default_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Build the modules; a default dtype is set by transformers, meanwhile, for every thread."""
    built: PreTrainedModel
    with MetaDevice(dtype):
        if model_class is not None:
            built = model_class._from_config(config, dtype=default_dtype)  # noqa: SLF001 - what it calls
        else:
            built = auto_class(config).from_config(
                config, dtype=default_dtype, trust_remote_code=False
            )
    if model_class is None and reads_pictures(config):
        drop_towers(built)
    return built


def _settle_buffers(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    model_class: type[PreTrainedModel] | None,
) -> None:
    """Cast computed buffers to the dtype they would have in a model that was made in `dtype`.

    Rotary frequencies are float32 in every model, so few models need to be made once more for it.
    """
    import torch

    unsettled = {
        name: buffer
        for name, buffer in model.named_buffers()
        if dtype != buffer.dtype == torch.float32 and not name.endswith("inv_freq")
    }
    if not unsettled:
        return
    like = dict(_build(config, dtype, model_class, default_dtype=dtype).named_buffers())
    for name, buffer in unsettled.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, buffer.to(like[name].dtype))
