"""Where each tensor of a checkpoint belongs in a transformers model of today.

Names in a checkpoint are those of the transformers of its year; transformers 5 renames some and
fuses a mixture's experts into one parameter, and its own conversion table says how, so nothing
here knows an architecture.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptq_loader_plugin.errors import TensorMismatch, UnsupportedFormat

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gptq_loader_plugin.checkpoint.reader import Checkpoint

__all__ = ["ExpertPlace", "ModulePlace", "Names", "Place"]

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
ROLES = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


class Names:
    """Where the tensors of a checkpoint belong in a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self._renamings = [
            transform for transform in transforms if not isinstance(transform, WeightConverter)
        ]
        self._converters = [
            transform for transform in transforms if isinstance(transform, WeightConverter)
        ]
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
            tensor=checkpoint.layer_tensors(name)[0],
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
        return next(
            (candidate for candidate in (longer, shorter) if candidate in self._known), name
        )
