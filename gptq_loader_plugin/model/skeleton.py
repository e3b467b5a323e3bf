"""Make a transformers model without weights, and find where each tensor of a checkpoint belongs.

The model is built with its parameters on the meta device and its buffers (rotary frequencies and
such) computed. Names in a checkpoint are those of the transformers of its year; transformers 5
renames some and fuses a mixture's experts into one parameter, and its own conversion table says
how, so nothing here knows an architecture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import TensorMismatch, UnsupportedFormat
from gptq_loader_plugin.model.meta import Hollow, empty_parameters

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from gptq_loader_plugin.checkpoint.reader import Checkpoint

__all__ = [
    "ExpertPlace",
    "ModulePlace",
    "Names",
    "Place",
    "build_skeleton",
    "linear_shape",
    "read_config",
]

EXPERT_INDEX = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class ModulePlace:
    """A tensor or layer belongs to one module or parameter, by its path in the model."""

    path: str


@dataclass(frozen=True, slots=True)
class ExpertPlace:
    """A layer is one projection of one expert, in a module that fuses experts.

    Attributes:
        parent: the fused module's path, `model.layers.0.mlp.experts`.
        expert: which expert.
        role: "gate", "up" or "down".
    """

    parent: str
    expert: int
    role: str


Place = ModulePlace | ExpertPlace
# What transformers raises for a config that it cannot make a model of.
UNBUILDABLE = (ValueError, KeyError, TypeError, AttributeError)
ROLES = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


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
    try:
        model = _build(config, dtype, model_class)
        _settle_buffers(model, config, dtype, model_class)
    except (*UNBUILDABLE, RuntimeError) as error:
        raise _unknown_model(model_type, path, error) from error
    empty_parameters(model)
    parts = [getattr(model.config, name) for name in model.config.sub_configs]
    for part in (model.config, *(it for it in parts if it is not None)):
        part.dtype = dtype
    model.eval()
    return model


def _build(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    model_class: type[PreTrainedModel] | None,
    *,
    default_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Build the modules; a default dtype is set by transformers, meanwhile, for every thread."""
    from transformers import AutoModelForCausalLM

    built: PreTrainedModel
    with Hollow(dtype):
        if model_class is not None:
            built = model_class._from_config(config, dtype=default_dtype)  # noqa: SLF001 - what it calls
        else:
            built = AutoModelForCausalLM.from_config(
                config, dtype=default_dtype, trust_remote_code=False
            )
    return built


def _settle_buffers(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    model_class: type[PreTrainedModel] | None,
) -> None:
    """Give computed buffers the dtype they would have in a model that was made in `dtype`.

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


def read_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Read config.json as transformers does, without what it says of quantisation.

    Raises:
        ConfigInvalid: config.json is missing or broken.
        UnsupportedFormat: transformers does not know the model, or it needs code of its own.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = checkpoint.model_config["model_type"]
    config: PreTrainedConfig
    try:
        if checkpoint.translated is None:
            config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)
        else:
            config = CONFIG_MAPPING[model_type].from_dict(checkpoint.translated)
    except (*UNBUILDABLE, OSError, StrictDataclassError) as error:
        raise _unknown_model(model_type, checkpoint.folder / "config.json", error) from error
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    return config


class Names:
    """Where the tensors of a checkpoint belong in a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self._renamings = [it for it in transforms if not isinstance(it, WeightConverter)]
        self._converters = [it for it in transforms if isinstance(it, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._known = set(model.state_dict().keys()) | {name for name, _ in model.named_buffers()}
        self._modules = {name for name, _ in model.named_modules()}

    def target(self, tensor: str) -> tuple[str, Any, str | None]:
        """Rename one tensor of a checkpoint.

        Returns:
            Its name in the model (whether or not it exists there); and, where transformers fuses
            it with others, the converter that does and the converter's pattern for it.
        """
        name = tensor
        for renaming in self._renamings:
            name = renaming.rename_source_key(name)[0]
        for converter in self._converters:
            renamed, pattern = converter.rename_source_key(name)
            if pattern is not None and self._exists(renamed):
                return self._with_prefix(renamed), converter, pattern
        # A model saved without a renaming that the table has (or with it already made) keeps its
        # own name where that is the one that exists.
        for candidate in (name, tensor):
            if self._exists(candidate):
                return self._with_prefix(candidate), None, None
        return name, None, None

    def place(self, tensor: str) -> Place | None:
        """Find where one tensor belongs: a parameter's path, an expert's projection, or nowhere."""
        target, converter, pattern = self.target(tensor)
        if converter is None:
            return ModulePlace(target) if self.exists(target) else None
        parent, _, fused = target.rpartition(".")
        expert = EXPERT_INDEX.search(tensor)
        roles = ROLES.get(fused)
        sources = list(converter.source_patterns)
        if expert is None or roles is None or len(sources) != len(roles):
            return None
        return ExpertPlace(parent, int(expert[1]), roles[sources.index(str(pattern))])

    def layer(self, name: str, checkpoint: Checkpoint) -> Place:
        """Find the module, or the expert, that a quantised layer replaces.

        Raises:
            TensorMismatch: the model has no such module.
            UnsupportedFormat: transformers fuses it in a way that is not known here.
        """
        match self.place(f"{name}.weight"):
            case ExpertPlace() as place:
                return place
            case ModulePlace(path=path):
                return ModulePlace(path.removesuffix(".weight"))
            case None:
                pass
        target, converter, _ = self.target(f"{name}.weight")
        if converter is not None:
            raise UnsupportedFormat(
                f"{name} is quantised, and this transformers fuses it into {target}",
                path=checkpoint.path,
                hint="ask for this model to be supported, and name it with your transformers",
            )
        raise TensorMismatch(
            f"{name} is quantised, and a {checkpoint.model_config['model_type']} model has "
            "no such layer",
            path=checkpoint.path,
            tensor=f"{name}.qweight",
            hint="check that config.json is of this checkpoint; update transformers if the "
            "model is newer than it",
        )

    def exists(self, target: str) -> bool:
        """Whether the model has a parameter or buffer of this name."""
        return target in self._known

    def inside_a_block(self, target: str) -> bool:
        """Whether a tensor without a place names a block that the model has: `layers.0.…`."""
        parts = target.split(".")
        for end in range(len(parts) - 1, 0, -1):
            if parts[end - 1].isdigit():
                path = ".".join(parts[:end])
                return path in self._modules or f"{self._prefix}.{path}" in self._modules
        return False

    def _exists(self, name: str) -> bool:
        return self._with_prefix(name) in self._known

    def _with_prefix(self, name: str) -> str:
        """Add or drop the base model's prefix, whichever makes a name that exists."""
        if name in self._known or not self._prefix:
            return name
        longer = f"{self._prefix}.{name}"
        shorter = name.removeprefix(f"{self._prefix}.")
        return next((it for it in (longer, shorter) if it in self._known), name)


def linear_shape(module: torch.nn.Module) -> tuple[int, int] | None:
    """Give (in_features, out_features) of a linear module; GPT-2's Conv1D is one, transposed."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return int(rows), int(columns)
    return None


def _unknown_model(model_type: str, path: Any, error: Exception) -> UnsupportedFormat:  # noqa: ANN401
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as version

    words = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in words or "custom code" in words:
        return UnsupportedFormat(
            f"{model_type} models bring Python code of their own, which is not run",
            path=path,
            hint="use a version of this model for an architecture that transformers has, or its "
            "GGUF version, which llama.cpp runs",
        )
    if model_type not in CONFIG_MAPPING:
        return UnsupportedFormat(
            f"transformers {version} has no {model_type} models",
            path=path,
            hint="update transformers: pip install -U transformers; or check model_type",
        )
    if words.startswith("Unrecognized configuration class"):
        return UnsupportedFormat(
            f"a {model_type} model is none that goes on with a text",
            path=path,
            hint="use a model for text generation; or check model_type",
        )
    return UnsupportedFormat(
        f"transformers cannot build a {model_type} model ({words[:200]})",
        path=path,
        hint="update transformers: pip install -U transformers; or check config.json",
    )
